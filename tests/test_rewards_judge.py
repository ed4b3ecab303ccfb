"""The judge: parts into trajectories, None, TRL's and users' own functions, and every way in which a part can fail."""

from __future__ import annotations

import textwrap
import time

import numpy as np
import pytest
from judge_server import Answer, JudgeServer
from pydantic import ValidationError
from rewards_helpers import image_segment, text, trajectory_of

from formats.config import FormatConfig
from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from formats.registry import get_format
from rewards.config import RewardsConfig
from rewards.contract import RewardError, RewardFailed
from rewards.detectors.base import UnknownClass
from rewards.formula.expression import ExpressionError
from rewards.judge.client import JudgeDown
from rewards.loader import load_reward
from rewards.manager import RewardManager
from rewards.runtime.isolate import ProcessWorker
from rewards.runtime.serving import CallFailed, ComponentSpec
from tasks.registry import get_task
from tasks.shapes.render import render
from tasks.shapes.world import Object, Scene

DOG = {"prompt": "a photo of a dog", "tag": "single_object", "wanted": "dog"}


def config(total=None, none_limit=3, **parts):
    parts = {name: {"function": part} if isinstance(part, str) else part for name, part in parts.items()}
    parts = {name: {"retry_wait_s": 0.0, **part} for name, part in parts.items()}
    return RewardsConfig(parts=parts, total=total, none_limit=none_limit)


@pytest.fixture
def own(tmp_path):
    """Writes a user's reward file and says how a recipe names a function in it."""

    def write(code, name="score"):
        path = tmp_path / "my_rewards.py"
        path.write_text(textwrap.dedent(code))
        return f"{path}:{name}"

    return write


def words(*texts, group=0):
    return [
        trajectory_of(DOG, text("answer", t, ids=range(len(t))), group=group, member=m) for m, t in enumerate(texts)
    ]


def judged(configuration, *groups, **kwargs):
    with RewardManager(configuration, **kwargs) as manager:
        report = manager.score(groups, step=1)
    return [[t.reward for t in group] for group in groups], report


# ---- functions of others ------------------------------------------------------------------------------------------


def test_trl_rewards_work_unchanged_on_thoughts_with_images():
    image = np.zeros((4, 4, 3), np.uint8)
    group = words("<think>\nhm\n</think>\nyes", "no tags")
    group[0].segments.insert(2, image_segment("sketch", image))  # after the words, so that TRL reads them around it
    configuration = config(
        think="trl.rewards.think_format_reward",
        long={
            "function": "trl.rewards.get_soft_overlong_punishment",
            "factory": True,
            "options": {"max_completion_len": 20, "soft_punish_cache": 15},
        },
    )
    rewards, report = judged(configuration, group)
    # 25 and 7 ids: over 20 is -1; (20 - 15 - 7) / 15 = -0.1333
    assert [t.rewards for t in group] == [{"think": 1.0, "long": -1.0}, {"think": 0.0, "long": pytest.approx(-2 / 15)}]
    assert rewards == [[0.0, pytest.approx(-2 / 15)]]
    assert report.failures == []


def test_a_users_file_needs_no_registration_and_gets_the_columns(own):
    path = own("""
        def score(prompts, completions, wanted, trajectories, trainer_state, log_metric, log_extra, bonus=0, **kw):
            assert prompts[0] == [{"role": "user", "content": "a photo of a dog"}]
            log_metric("rows", len(prompts))
            log_extra("length", [len(c[0]["content"]) for c in completions])
            return [trainer_state.global_step + bonus + (w in c[0]["content"]) for w, c in zip(wanted, completions)]
        """)
    group, other = words("a dog", "a cat"), words("dog", group=1)
    rewards, report = judged(config(mine={"function": path, "options": {"bonus": 0.5}}), group, other)
    assert rewards == [[2.5, 1.5], [2.5]]  # global_step is 1
    assert report.metrics["reward/mine/rows"] == 3
    assert group[1].info["rewards"] == {"mine": {"length": 5}}


def test_images_reach_a_users_function(own):
    path = own("""
        def score(completions):
            import numpy as np
            return [np.asarray(part["image"]).mean() / 255 for row in completions for part in row[0]["content"]
                    if part["type"] == "image"]
        """)
    group = [
        trajectory_of(DOG, text("plan", "so"), image_segment("sketch", np.full((2, 2, 3), v, np.uint8)))
        for v in (0, 51)
    ]
    assert judged(config(mine=path), group)[0] == [[0, pytest.approx(0.2)]]


def test_async_functions_and_dotted_paths(own, monkeypatch, tmp_path):
    own("""
        import asyncio
        async def score(completions, **kwargs):
            await asyncio.sleep(0)
            return [0.25] * len(completions)
        """)
    monkeypatch.syspath_prepend(tmp_path)
    assert judged(config(mine="my_rewards.score"), words("a"))[0] == [[0.25]]
    assert judged(config(mine={"function": "my_rewards:score", "isolate": False}), words("a"))[0] == [[0.25]]


def test_group_members_stand_next_to_each_other(own):
    path = own("""
        def score(trajectories, **kwargs):
            return [t.group * 10 + t.member for t in trajectories]
        """)
    assert judged(config(mine=path), words("a", "b"), words("c", group=1))[0] == [[0, 1], [10]]


def test_completions_are_strings_where_neither_prompts_nor_thoughts_hold_images(own):
    """TRL gives strings for prompts that are strings, and message lists for conversations."""
    path = own("""
        def score(prompts, completions, **kw):
            return [float(len(p) + 100 * len(c)) for p, c in zip(prompts, completions)]
        def messages(completions): return [float(c[0]["content"] == "a dog") for c in completions]
        """)
    records = [{"prompt": "a photo of a dog"}]
    follow = {START: ("answer",), "answer": (END,)}
    words_only = DeclaredFormat(Grammar("words", (Role("answer"),), follow, max_images=0))
    drawing = get_format("strokes")

    def paid(fmt, records=records, name="score", **part):
        group = words("a dog", "two cats")
        section = config("coalesce(mine, -1)", mine={"function": path.replace(":score", f":{name}"), **part})
        rewards, report = judged(section, group, task=Prompts(records), fmt=fmt)
        return rewards[0], report

    strings, messages = [16 + 500, 16 + 800], [101, 101]  # letters of prompt and completion, or a message of each
    assert paid(words_only)[0] == strings and paid(words_only, isolate=False)[0] == strings
    assert paid(drawing)[0] == messages and paid(None)[0] == messages
    assert paid(words_only, [*records, {"prompt": "what is it?", "images": ["dog.png"]}])[0] == messages
    assert paid(drawing, completions="strings")[0] == strings
    assert paid(words_only, completions="interleaved")[0] == messages
    nothing, report = paid(words_only, name="messages")
    assert nothing == [-1, -1] and "set completions: text or interleaved" in report.failures[0].message
    assert paid(words_only, name="messages", completions="text")[0] == [1.0, 0.0]
    assert paid(words_only, name="messages", function="trl.rewards.think_format_reward")[0] == [0.0, 0.0]


class Prompts:
    """A task of these records alone, as far as rewards read one."""

    def __init__(self, records):
        self.records = records

    def prompts(self, split):
        return self.records


def test_the_start_asks_as_the_parts_will():
    """t2i_r1_yes shows images and reads log-probs; an endpoint without these is found out before the run."""

    def answer(body, _):
        kinds = {part["type"] for m in body["messages"] if isinstance(m["content"], list) for part in m["content"]}
        refused = "image_url" in kinds or "logprobs" in body
        return Answer(status=400, body=b'{"error": {"message": "words only"}}') if refused else "yes"

    def manager(server, function):
        judge = {"base_url": server.url, "model": "judge", "retries": 0}
        return RewardManager(RewardsConfig.model_validate({"parts": {"a": {"function": function}}, "judge": judge}))

    with JudgeServer(answer) as server:
        with pytest.raises(JudgeDown, match="refuses images .*rewards.judge.model"):
            manager(server, "t2i_r1_yes")
        manager(server, "deepeyes").close()  # which compares words


# ---- composition --------------------------------------------------------------------------------------------------

SCORES = """
    def a(completions, **kw): return [1.0, 2.0, None]
    def b(completions, **kw): return [0.5, None, 0.25]
    def segments(completions, **kw): return [{1: 1.0, 0: 0.5}, {1: None}, None]
    """


def test_parts_weights_and_none(own):
    path = own(SCORES).partition(":")[0]
    group = words("x", "y", "z")
    rewards, report = judged(config(a={"function": f"{path}:a", "weight": 2}, b=f"{path}:b"), group)
    assert rewards == [[2.5, None, None]]
    assert [t.rewards for t in group] == [{"a": 1, "b": 0.5}, {"a": 2, "b": None}, {"a": None, "b": 0.25}]
    expected = {
        "reward/mean": 2.5,
        "reward/std": 0,
        "reward/none": 2 / 3,
        "reward/a": 1.5,
        "reward/a/none": 1 / 3,
        "reward/b": 0.375,
        "reward/b/none": 1 / 3,
        "reward/a/failed": 0,
    }
    assert {key: report.metrics[key] for key in expected} == pytest.approx(expected)
    assert (report.judged, report.unjudged) == (1, 2)
    total = "coalesce(a, 0) * (1 + coalesce(b, -1))"
    assert judged(config(total, a=f"{path}:a", b=f"{path}:b"), group)[0] == [[1.5, 0, 0]]


def test_rows_by_segment_credit_segments_and_their_mean_stands_in_the_formula(own):
    path = own(SCORES, "segments")
    group = words("x", "y", "z")
    assert judged(config(s=path), group)[0] == [[0.75, None, None]]
    assert [t.segment_rewards for t in group] == [{"s": {1: 1.0, 0: 0.5}}, {}, {}]


def test_a_formula_that_divides_by_zero_names_the_trajectory(own):
    path = own("def score(completions): return [1, 0]")
    with pytest.raises(ExpressionError, match=r"'1 / a' divides by zero for trajectory 0-1 \(a = 0.0\)"):
        judged(config("1 / a", a=path), words("x", "y"))


# ---- faults -------------------------------------------------------------------------------------------------------


def test_a_part_that_raises_is_retried_then_none_and_shown(own):
    path = own("""
        def score(completions): raise ValueError("no server")
        def fine(completions): return [1.0] * len(completions)
        """)
    group = words("x", "y")
    rewards, report = judged(config("coalesce(bad, 0) + good", bad=path, good=path.replace(":score", ":fine")), group)
    assert rewards == [[1, 1]] and [t.rewards["bad"] for t in group] == [None, None]
    assert [(f.part, f.kind, f.attempt, f.rows) for f in report.failures] == [
        ("bad", "raised", 1, 0),
        ("bad", "raised", 2, 2),
    ]
    assert "ValueError: no server" in report.sentences()[1] and "my_rewards.py:2" in report.sentences()[1]
    assert "2 trajectories go unjudged" in report.sentences()[1]
    assert report.metrics["reward/bad/failed"] == 1 and report.metrics["reward/bad/none"] == 1
    assert "reward/bad" not in report.metrics  # a mean over nothing is no number


@pytest.mark.parametrize("isolate", [True, False])
def test_a_second_try_can_succeed(own, tmp_path, isolate):
    path = own(f"""
        import os
        def score(completions):
            if not os.path.exists("{tmp_path}/seen"):
                open("{tmp_path}/seen", "w").close()
                raise OSError("once")
            return [1.0]
        """)
    rewards, report = judged(config(mine={"function": path, "isolate": isolate}), words("x"))
    assert rewards == [[1.0]] and [f.rows for f in report.failures] == [0]


def test_nan_is_a_fault_and_never_zero(own):
    path = own("def score(completions): return [1.0, float('nan'), float('inf')]")
    rewards, report = judged(config(mine=path), words("x", "y", "z"))
    assert rewards == [[1.0, None, None]]
    assert [(f.kind, f.rows) for f in report.failures] == [("nan", 0), ("nan", 2)]


def test_a_part_that_hangs_is_killed_and_says_where_it_stood(own):
    path = own("""
        import time
        def dawdle(): time.sleep(600)
        def score(completions): dawdle()
        """)
    group = words("x")
    with RewardManager(config("coalesce(slow, 0)", slow={"function": path, "timeout_s": 0.5, "retries": 0})) as manager:
        process = manager.parts["slow"].workers[0]._process
        started = time.monotonic()
        report = manager.score([group])
        assert time.monotonic() - started < 30
        assert process.poll() is not None  # dead, not left behind
    assert group[0].rewards == {"slow": None} and group[0].reward == 0
    (fault,) = report.failures
    assert fault.kind == "timeout" and "longer than 0.5 s" in fault.message
    assert "dawdle" in fault.stack and "my_rewards.py" in fault.stack


def test_a_hang_delays_no_other_part_and_the_next_step_works(own, tmp_path):
    path = own(f"""
        import os, time
        def score(completions):
            if not os.path.exists("{tmp_path}/seen"):
                open("{tmp_path}/seen", "w").close()
                time.sleep(600)
            return [1.0]
        def quick(completions): return [2.0]
        """)
    with RewardManager(
        config(
            "coalesce(slow, 0) + quick",
            slow={"function": path, "timeout_s": 0.5, "retries": 0},
            quick=path.replace(":score", ":quick"),
        )
    ) as manager:
        first, second = words("x"), words("x")
        manager.score([first])
        manager.score([second])
    assert (first[0].reward, second[0].reward) == (2.0, 3.0)


def test_a_part_that_takes_its_process_down_is_a_fault(own):
    path = own("""
        import os, signal
        def score(completions): os.kill(os.getpid(), signal.SIGSEGV)
        def leave(completions): raise SystemExit(3)
        """)
    for name, what in (("score", "signal 11"), ("leave", "SystemExit: 3")):
        report = judged(config("coalesce(bad, 0)", bad=path.replace(":score", f":{name}")), words("x"))[1]
        assert what in report.failures[-1].message


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "reward 'mine' returned 1 values for 2 completions"),
        ("return 1.0", "returned float; it must return a list"),
        ("return ['good', 'bad']", "returned 'good' for a completion"),
        ("return [{9: 1.0}, None]", "credits segment 9 of trajectory 0-0, which has segments 0 to 1"),
    ],
)
def test_breaking_the_contract_stops_at_once(own, body, message, isolate):
    path = own(f"def score(completions, **kw): {body}")
    with pytest.raises(RewardError, match=message):
        judged(config(mine={"function": path, "isolate": isolate}), words("x", "y"))


def test_arguments_that_do_not_exist_are_named(own):
    path = own("def score(completions, wnated): return [1.0]\ndef opt(completions, bonus=1): return [1.0]")
    with pytest.raises(RewardError, match="asks for 'wnated', which is no column of the records; did you mean 'wanted"):
        judged(config(mine=path), words("x"))
    with pytest.raises(RewardError, match="options: 'bouns' is no argument of the function; did you mean 'bonus'"):
        RewardManager(config(mine={"function": path.replace(":score", ":opt"), "options": {"bouns": 1}}))


def test_a_text_reward_that_meets_images_is_told_what_to_set(own):
    path = own("import re\ndef score(completions): return [bool(re.match('a', c[0]['content'])) for c in completions]")
    group = [trajectory_of(DOG, text("plan", "abc"), image_segment("sketch", np.zeros((2, 2, 3), np.uint8)))]
    report = judged(config("coalesce(mine, 0)", mine=path), group)[1]
    assert "set completions: text" in report.failures[0].message
    assert judged(config(mine={"function": path, "completions": "text"}), group)[0] == [[1.0]]


def test_the_run_stops_when_a_part_fails_too_often(own, tmp_path):
    path = own(f"""
        import os
        def score(completions):
            if os.path.exists("{tmp_path}/works"): return [1.0]
            raise ValueError("no server")
        """)
    with RewardManager(config("coalesce(mine, 0)", none_limit=2, mine={"function": path, "retries": 0})) as manager:
        manager.score([words("x")], step=0)
        (tmp_path / "works").touch()
        manager.score([words("x")], step=1)  # a good step starts the count afresh
        (tmp_path / "works").unlink()
        manager.score([words("x")], step=2)
        with pytest.raises(
            RewardFailed,
            match=r"part 'mine' .*failed in 2 step\(s\) in a row, up to step 3: "
            r"ValueError: no server.*rewards.none_limit",
        ):
            manager.score([words("x")], step=3)


def test_the_run_stops_when_nothing_is_judged(own):
    path = own("def score(completions): return [None] * len(completions)")
    with RewardManager(config("mine", none_limit=2, mine=path)) as manager:
        assert manager.score([words("x", "y")]).metrics["reward/none"] == 1
        with pytest.raises(RewardFailed, match="'mine' gave None for all.*coalesce"):
            manager.score([words("x", "y")])
    with RewardManager(config("coalesce(mine, 0)", none_limit=1, mine=path)) as manager:
        manager.score([words("x")])  # None by choice is no failure


# ---- at the start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("def score(completions):\n  return [", "score", "line 2"),
        ("import no_such_package", "score", "does not import: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def scores(completions): return []", "score", "has no function 'score'; did you mean 'scores'"),
        ("score = 3", "score", "is int, not a function"),
        ("class Score: pass", "Score", "is a class; set factory: true"),
        ("raise RuntimeError('broken')", "score", r"RuntimeError: broken at .*my_rewards.py:1"),
    ],
)
def test_files_that_do_not_load_are_named(own, code, name, message):
    path = own(code, name)
    with pytest.raises(RewardError, match=message):
        load_reward(path)
    with pytest.raises(RewardError, match=message):  # and before any rollout
        RewardManager(config(mine=path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("geneva", "no reward 'geneva'; did you mean 'geneval'"),
        ("missing/file.py:score", "no file missing/file.py"),
        ("missing/file.py", "name the function too, as 'missing/file.py:function'"),
    ],
)
def test_a_recipe_names_what_is_not_there(spec, message):
    with pytest.raises(RewardError, match=message):
        config(mine=spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_package.score", "no module 'no_such_package' on the path"),
        ("trl.rewards.think_fromat_reward", "no function 'think_fromat_reward'"),
    ],
)
def test_dotted_paths_that_lead_nowhere(spec, message):
    with pytest.raises(RewardError, match=message):
        load_reward(spec)


@pytest.mark.parametrize(
    ("parts", "total", "message"),
    [
        ({"min": {"function": "format"}}, None, "must be a plain word"),
        ({"a b": {"function": "format"}}, None, "must be a plain word"),
        ({"a": {"function": "format", "weight": 2}}, "a", "weight has no use beside `total`"),
        ({"a": {"function": "geneval", "scope": "batch"}}, None, "sees a row, which is no matter of choice"),
        ({"a": {"function": "format", "isolate": False, "workers": {}}}, None, "isolate: false keeps it in the driver"),
        ({"a": {"function": "format", "workers": {"num_gpus": 1}}}, None, "only Ray deals out GPUs"),
        (
            {"a": {"function": "trl.rewards.think_format_reward", "scope": "batch", "workers": {"batch_size": 2}}},
            None,
            "gets it in one call",
        ),
        ({"a": {"function": "format", "log_only": True, "weight": 2}}, None, "a log-only component has no weight"),
        ({"a": {"function": "format", "weight": "w"}}, None, "no schedule 'w'"),
        ({"group_mean": {"function": "format"}}, None, "must be a plain word"),
        ({}, None, "at least 1 item"),
        ({"a": {"function": "format", "timeout": 3}}, None, "Extra inputs"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(parts, total, message):
    with pytest.raises(ValidationError, match=message):
        RewardsConfig(parts=parts, total=total)


def test_an_unknown_part_in_the_formula_is_refused():
    with pytest.raises(ExpressionError, match="no reward part 'resutl'; did you mean 'result'"):
        config("resutl + 1", result="format")


def test_paying_for_the_format_under_full_constraint_is_refused():
    pays = config("result + 0.5 * form", result="geneval", form="format")
    logs = config("result", result="geneval", form="format")
    pays.refuse_constant_format(FormatConfig(constrain="images"))
    logs.refuse_constant_format(FormatConfig(constrain="full"))
    with pytest.raises(ValueError, match="rewards.parts.form pays for the format, but format.constrain is 'full'"):
        pays.refuse_constant_format(FormatConfig(constrain="full"))
    with pytest.raises(ValueError, match="rewards.parts.form"):  # the plain sum pays too
        config(result="geneval", form="format").refuse_constant_format(FormatConfig(constrain="full"))
    config(result="geneval", form={"function": "format", "weight": 0}).refuse_constant_format(
        FormatConfig(constrain="full")
    )


def test_a_class_that_the_worlds_detector_lacks_is_named_before_any_rollout():
    class Dogs:
        name, classes = "dogs", ("circle",)

        def prompts(self, split):
            return [{"prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]}]

        def detect(self, image):
            return []

    with pytest.raises(UnknownClass, match="'a photo of a dog' .*asks for 'dog', which the detector cannot see"):
        RewardManager(config(result="geneval"), Dogs())
    with pytest.raises(RewardError, match="needs a detector"):
        RewardManager(config(result="geneval"))


# ---- processes ----------------------------------------------------------------------------------------------------


def test_a_part_leaves_when_its_driver_is_gone(own):
    reward = ProcessWorker(ComponentSpec("mine", own("def score(completions): return [1.0]")))
    reward.start()
    process = reward._process
    reward._to.close()  # what the end of the driver does
    assert process.wait(timeout=10) == 0
    reward.close()


def test_closing_ends_a_call_in_another_thread(own):
    import threading

    from rewards.contract import TrainerState

    reward = ProcessWorker(ComponentSpec("mine", own("import time\ndef score(completions): time.sleep(600)")))
    reward.start()
    raised = []

    def wait():
        try:
            reward(words("x"), TrainerState())
        except CallFailed as failure:
            raised.append(failure.kind)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    reward.close()
    thread.join(10)
    assert raised == ["crash"] and not thread.is_alive()


def test_what_a_reward_prints_does_not_disturb_the_pipe(own):
    path = own("""
        import os, subprocess
        def score(completions):
            print("hello"); os.write(1, b"raw"); subprocess.run(["echo", "child"])
            return [1.0]
        """)
    assert judged(config(mine=path), words("x"))[0] == [[1.0]]


def test_a_large_batch_crosses_the_pipe(own):
    path = own("def score(completions, trajectories): return [t.images()[0].nbytes for t in trajectories]")
    group = [trajectory_of(DOG, image_segment("sketch", np.zeros((512, 512, 3), np.uint8))) for _ in range(8)]
    assert judged(config(mine=path), group)[0] == [[786432.0] * 8]


# ---- sharing --------------------------------------------------------------------------------------------------------


def test_the_shapes_recipe_shares_one_look_at_each_image():
    task = get_task("shapes")
    group = []
    for member in range(8):
        demo = task.demonstrations("strokes", 1, seed=member)[0]
        images = [render(Scene((Object("circle", "red", place, member % 2),))) for place in range(3)]
        group.append(
            trajectory_of(
                demo.record,
                *[image_segment("sketch", p) for p in images],
                text("inspect", "<inspect> nothing : fine </inspect>"),
                member=member,
            )
        )
    with RewardManager(
        config(
            "result + coalesce(critique, 0) + better",
            result="geneval",
            critique="critique_consistency",
            better="improvement",
        ),
        task,
    ) as manager:
        manager.score([group])
        assert manager.context.detector.looks == 4  # first and final image x 2 jitters, however often asked for
