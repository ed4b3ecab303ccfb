"""Pictures and frames of a prompt, from a data set's row to the model, the record, the report and W&B's table."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats.registry import get_format
from formats.segments import media_segment
from policy.base import score_trajectories
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from policy.registry import load_policy
from record.store import load_trajectories, save_trajectories
from record.trajectory import Author, Frames, Modality
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.requests import request_of
from rollout.shown import ShownSlots
from runtime.errors import UserError
from tasks import dataset
from tasks.config import DatasetConfig, TaskConfig
from tasks.images import data_url
from tasks.lengths import fitting
from tasks.media import media_of
from tasks.videos import read_video, video_file
from tests.chameleon_helpers import small_policy
from tests.fakes import FakeFormat, FakeVocabulary
from tests.families.bagel import Bagel, BagelFormat
from tests.families.lvm import Lvm, Planner
from tests.families.thinker import Thinker, Watch, more_frames
from tests.tool_helpers import answering
from training.wandb_mirror import filmstrip, pictures_of
from underdrawing.cli import main
from underdrawing.report.page import ReportData, film_of, render

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plain(color, size=(6, 8)) -> Image.Image:
    return Image.new("RGB", size, color)


def png(path: Path, color) -> Path:
    plain(color).save(path)
    return path


def gif(path: Path, count: int, seconds: float = 0.5) -> Path:
    # Frames that are alike would be joined.
    frames = [plain((40 * n, 0, 255 - 40 * n)) for n in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=int(1000 * seconds), loop=0)
    return path


def rows(folder: Path, *values) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return str(path)


def build(path, **config):
    return dataset.build(DatasetConfig(path=str(path), heldout_share=0, **config))


# ---- from columns to a record ----


def test_a_record_names_what_its_prompt_shows_in_order(tmp_path):
    for name, color in (("a", RED), ("b", GREEN), ("c", BLUE)):
        png(tmp_path / f"{name}.png", color)
    gif(tmp_path / "walk.gif", 5)
    path = rows(
        tmp_path,
        {"prompt": "which?", "pics": ["a.png", "b.png"], "goal": "c.png", "clip": "walk.gif"},
        {"prompt": "", "pics": "c.png", "goal": "a.png", "clip": None},
    )
    config = {"images": ["pics", "goal"], "videos": ["clip"], "show": ["clip", "pics"], "frames": 2}
    first, second = build(path, **config).prompts("train")
    assert [list(item) for item in first["media"]] == [["video", "frames"], ["image"], ["image"]]
    json.dumps(first)  # it is kept as JSON
    video, a, b = media_of(first)
    assert isinstance(video, Frames) and video.time_F.tolist() == [0.0, 1.0]  # frames 0 and 2 of 5, half a second each
    assert a[0, 0].tolist() == list(RED) and b[0, 0].tolist() == list(GREEN) and a.shape == (8, 6, 3)
    assert first["goal"].endswith("c.png")  # a reward's alone
    (only,) = media_of(second)
    assert second["prompt"] == "" and only[0, 0].tolist() == list(BLUE)
    # What a run wrote down reads like what was written by hand.
    assert build(rows(tmp_path, first, second)).prompts("train") == [first, second]
    assert media_of({"prompt": "no pictures"}) == ()


def test_pictures_of_the_datasets_library_are_shown(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    held = io.BytesIO()
    plain(GREEN).save(held, "PNG")
    features = Features({"prompt": Value("string"), "one": ImageFeature(), "many": List(ImageFeature())})
    content = {"prompt": ["x"], "one": [held.getvalue()], "many": [[held.getvalue()] * 2]}
    Dataset.from_dict(content, features).save_to_disk(tmp_path / "saved")
    (record,) = build(tmp_path / "saved", images=["one", "many"], show=["many", "one"]).prompts("train")
    assert [image[0, 0].tolist() for image in media_of(record)] == [list(GREEN)] * 3


def test_a_data_url_and_a_list_of_frames_are_media(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 256, (5, 3, 3), np.uint8)
    frames = [str(png(tmp_path / f"{n}.png", (n, 0, 0))) for n in range(6)]
    image, video = media_of({"media": [{"image": data_url(drawn)}, {"video": frames, "frames": 3}]})
    np.testing.assert_array_equal(image, drawn)
    assert video.time_F.tolist() == [0, 2, 4] and video.frames_F[:, 0, 0, 0].tolist() == [0, 2, 4]


def test_an_animated_image_is_a_video(tmp_path):
    path = video_file(gif(tmp_path / "walk.gif", 4, 0.25).read_bytes(), tmp_path, "row 1")
    assert Path(path).parent == tmp_path / "cache/underdrawing/images"  # what has no file gets one
    video = read_video(path, 9)
    np.testing.assert_allclose(video.time_F, [0, 0.25, 0.5, 0.75])
    assert video.frames_F.shape == (4, 8, 6, 3)
    assert (np.diff(video.frames_F[:, 0, 0, 0].astype(int)) > 20).all()  # in their order


def test_other_videos_are_read_by_pyav(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "walk.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for n in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 30 * n, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = read_video(video_file("walk.mp4", tmp_path, "row 1"), 4)
    assert video.frames_F.shape == (4, 16, 32, 3)
    np.testing.assert_allclose(video.time_F, [0, 0.5, 1, 1.5], atol=1e-3)
    assert (np.diff(video.frames_F.mean((1, 2, 3))) > 40).all()


def test_without_pyav_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "walk.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(50))
    with pytest.raises(UserError, match=r"line 3.*walk.mp4 is read by PyAV, which is not installed; `pip install av`"):
        video_file("walk.mp4", tmp_path, "rows.jsonl line 3, column 'clip'")


@pytest.mark.parametrize(
    "row, config, words",
    [
        ({}, {"show": ["pic"]}, r"show: 'pic' is none of the columns in .*images and .*videos; name it in one"),
        ({"pics": "a.png"}, {"images": ["pics"], "show": ["pic"]}, "show: 'pic' is none .*; did you mean 'pics'"),
        ({"pic": "a.png"}, {"images": ["pic"], "videos": ["pic"]}, "videos: 'pic' is named in .*images too"),
        ({"pic": "a.png", "media": 1}, {"images": ["pic"], "show": ["pic"]}, "data has a column 'media', which says"),
        ({"media": "a.png"}, {}, "line 1: media: a list of .* is expected, not str; if the prompt is not to show"),
        ({"media": [{"img": "a.png"}]}, {}, "line 1: media, item 1: an item has the key image or the key video"),
        ({"media": [{"image": "a.png", "frames": 2}]}, {}, "media, item 1: no key 'frames'"),
        ({"media": [{"video": "a.gif", "frames": 0}]}, {}, "media, item 1: frames is 0; it is a number, 1 or more"),
        ({"media": [{"image": "b.png"}]}, {}, "line 1, column 'media', item 1: the image .*b.png cannot be read"),
        ({"clip": "b.gif"}, {"videos": ["clip"]}, "line 1, column 'clip': there is no video .*b.gif"),
        ({"clip": []}, {"videos": ["clip"]}, "line 1, column 'clip': a video of no frames"),
        ({"clip": 3}, {"videos": ["clip"]}, "line 1, column 'clip': int is no video"),
        ({"clip": ["a.png", "b.png"]}, {"videos": ["clip"]}, "line 1, column 'clip', frame 2: the image .*b.png"),
        ({"clip": "cut.gif"}, {"videos": ["clip"]}, "line 1, column 'clip': .*cut.gif"),
        ({"prompt": " "}, {}, "line 1, column 'prompt': the prompt is empty"),
    ],
)
def test_what_cannot_be_shown_is_named_by_row_and_column(tmp_path, row, config, words):
    png(tmp_path / "a.png", RED)
    (tmp_path / "cut.gif").write_bytes(gif(tmp_path / "walk.gif", 5).read_bytes()[:60])
    with pytest.raises(UserError, match=words):
        build(rows(tmp_path, {"prompt": "x", **row}), **config)


def test_frames_of_unlike_sizes_are_no_video(tmp_path):
    plain(RED, (3, 3)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="the frames of one video have several sizes"):
        read_video([str(png(tmp_path / "a.png", RED)), str(tmp_path / "small.png")], 2)


# ---- from a record to what the policy is asked ----


def test_what_is_shown_counts_among_what_fits(tmp_path):
    policy = small_policy()  # an image is 16 codes and two markers
    fmt = get_format("strokes")
    records = [
        {"prompt": "red", "media": [{"image": str(png(tmp_path / "a.png", RED))}]},
        {"prompt": "red", "media": [{"image": str(tmp_path / "a.png")}] * 2},
        {"prompt": "red"},
    ]
    shown = ShownSlots(policy)
    assert [shown(record) for record in records] == [18, 36, 0]
    words = len(fmt.prompt_ids("red", policy.vocabulary))
    config = TaskConfig(max_prompt_length=words + 18, overlong_prompts="drop")
    kept = fitting(records, fmt, policy.vocabulary, policy.max_length, config, "train", shown)
    assert kept == [records[0], records[2]]
    lost = [{"prompt": "red", "media": [{"image": "lost.png"}]}]
    with pytest.raises(UserError, match=r"'red', cannot be shown \(media, item 1: the image .*lost.png cannot be read"):
        fitting(lost, fmt, policy.vocabulary, policy.max_length, TaskConfig(), "train", shown)
    with pytest.raises(UserError, match=r"the prompt 'red' \(train\): media: a list of .* is expected, not str"):
        fitting([{"prompt": "red", "media": "a.png"}], fmt, policy.vocabulary, 99, TaskConfig(), "train")


def test_what_a_family_or_a_format_cannot_show_is_named(tmp_path):
    video = {"prompt": "red", "media": [{"video": str(gif(tmp_path / "walk.gif", 3))}]}
    policy = small_policy()
    with pytest.raises(
        UserError, match=r"1 of 1 prompts \(train\) .*'red', cannot be shown .*'prompt' holds 3 frames.*; change them$"
    ):
        fitting([video], get_format("strokes"), policy.vocabulary, 200, TaskConfig(), "train", ShownSlots(policy))
    with pytest.raises(UserError, match=r"'fake_plain': its prompts are words alone, and 'red' \(train\) shows 1 "):
        fitting([video], FakeFormat(), FakeVocabulary(), 200, TaskConfig(), "train")


# ---- from the request to the record, the report and the table ----


def image_record(folder: Path) -> dict:
    return {"prompt": "red", "media": [{"image": str(png(folder / "a.png", RED))}]}


def video_record(folder: Path) -> dict:
    return {"prompt": "left", "media": [{"video": str(gif(folder / "walk.gif", 5)), "frames": 5}]}


def picture_record(folder: Path) -> dict:
    return {"prompt": "", "media": [{"image": str(png(folder / "b.png", (80, 80, 80)))}]}


ENDS = {
    "chameleon": (small_policy, get_format("strokes", max_images=2, max_tokens=3), image_record, None),
    "bagel": (Bagel, BagelFormat(False, max_tokens=3), image_record, None),
    "lvm": (Lvm, Planner(), picture_record, None),
    "thinker": (Thinker, Watch(), video_record, answering(more_frames)),
}


@pytest.mark.parametrize("name", ENDS)
def test_from_a_record_to_the_report(name, tmp_path):
    make, fmt, record_in, tools = ENDS[name]
    record, policy = record_in(tmp_path), make()
    constrain = "images" if name == "lvm" else "full"
    config = RolloutConfig(rows=2, max_tokens=80, flow={"steps": 3})
    engine = Engine(policy, fmt, config, constrain, tools)
    written = engine.run([request_of(0, record, range(3), 0)])
    engine.close()
    save_trajectories(written, tmp_path / "stored")
    stored = load_trajectories(tmp_path / "stored")
    shown = [s for s in stored[0].segments if s.author is Author.USER and s.modality is not Modality.TEXT]
    assert len(shown) == 1
    (media,) = media_of(record)
    if isinstance(media, Frames):
        np.testing.assert_array_equal(shown[0].frames.frames_F, media.frames_F)
    else:
        np.testing.assert_array_equal(shown[0].image, media)
    assert float(score_trajectories(policy, stored).log_ratio_N.detach().abs().max()) < 1e-4  # seen again as it was

    film = film_of(stored[0])
    first = film.frames[0]
    assert (first.role, first.author) == ("prompt", "user")
    assert first.image.startswith("data:image/png;base64,")
    page = render(ReportData("run", "", sampled=[(1, stored)]))
    assert page.count(first.image) == 3
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.image.partition(",")[2]))))
    count = 4 if isinstance(media, Frames) else 1  # a video's frames stand side by side, four of them
    assert first.pictures == count and strip.shape == (8, 6 * count + 4 * (count - 1), 3)
    np.testing.assert_array_equal(strip[:, :6], pictures_of(shown[0])[0])


def test_frames_that_the_environment_brought_are_shown():
    video = Frames(np.zeros((2, 4, 4, 3), np.uint8) + np.array([0, 200], np.uint8)[:, None, None, None], np.arange(2.0))
    pictures = pictures_of(media_segment("frames", video, Author.ENVIRONMENT))
    assert [int(p.max()) for p in pictures] == [0, 200]
    assert filmstrip(pictures, height=0).shape == (4, 12, 3)


def test_grpo_and_rollouts_on_prompts_with_pictures(tmp_path, capsys, monkeypatch):
    """The commands, on a tiny Chameleon and four questions about pictures."""
    monkeypatch.chdir(tmp_path)
    colors = {"red": RED, "green": GREEN, "blue": BLUE, "black": (0, 0, 0)}
    questions = []
    for name, color in colors.items():
        plain(color, (32, 32)).save(tmp_path / f"{name}.png")
        questions.append({"question": f"a {name} circle", "pic": f"{name}.png"})
    rows(tmp_path, *questions)
    (tmp_path / "own.py").write_text(
        "def ids(completion_ids, **columns):\n    return [float(sum(own) % 7) for own in completion_ids]\n"
    )
    tiny = TinySection(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    load_policy(ChameleonPolicyConfig(tiny=tiny), ["a", "circle", *colors]).save(tmp_path / "model")
    recipe = {
        "name": "pictures",
        "run_dir": "run",
        "policy": {"path": "model"},
        "task": {
            "dataset": {"path": "rows.jsonl", "columns": {"prompt": "question"}, "images": ["pic"], "show": ["pic"]}
        },
        "format": {"name": "strokes", "max_images": 1},
        "rollout": {"workers": 0, "rows": 4, "max_tokens": 20},
        "rewards": {"parts": {"ids": {"function": "own.py:ids"}}, "total": "ids"},
        "grpo": {"steps": 1, "prompts_per_step": 2, "num_generations": 2},
        "evaluate": {"prompts": 1},
        "track": {"wandb": "disabled"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["grpo", "recipe.yaml"]) == 0, capsys.readouterr().err
    assert main(["rollout", "recipe.yaml", "--prompts", "1", "--samples", "2", "--out", "written"]) == 0
    written = load_trajectories(tmp_path / "written")
    trained = load_trajectories(next((tmp_path / "run/trajectories").iterdir()))
    for trajectory in (*trained, *written):
        shown = [s.image for s in trajectory.segments if s.author is Author.USER and s.image is not None]
        assert len(shown) == 1 and shown[0][0, 0].tolist() == list(colors[trajectory.prompt.split()[1]])
    assert main(["view", "run"]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert film_of(trained[0]).frames[0].image in page

    recipe["task"]["dataset"]["show"] = []
    (tmp_path / "words.yaml").write_text(json.dumps(recipe | {"run_dir": "words"}))
    assert main(["rollout", "words.yaml", "--prompts", "1", "--weights", "model", "--out", "unseen"]) == 0
    assert all(
        s.image is None for t in load_trajectories(tmp_path / "unseen") for s in t.segments if s.role == "prompt"
    )
