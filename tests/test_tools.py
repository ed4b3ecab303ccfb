"""How a call is read, what `look` returns, and tools that do not fit the recipe: found by name before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.declared import DeclaredFormat
from formats.grammar import END, START, Grammar, Role
from formats.registry import get_format
from record.trajectory import Author, Modality, Segment, Trajectory
from rollout.tools.answers import role_for
from rollout.tools.base import ToolCall, ToolError
from rollout.tools.check import check_tool
from rollout.tools.config import ToolConfig
from rollout.tools.fitting import check_fit
from rollout.tools.look import Look, LookOptions, crop
from rollout.tools.parse import parse_call
from rollout.tools.registry import Tools, ToolsError, build_tools, words_of
from tests.test_cli import ROOT
from tests.tool_helpers import Blocking, Counting, Hanging, Raising, Replies
from underdrawing.recipe import RecipeError, load_recipe

CHAT = DeclaredFormat(
    Grammar(
        name="chat",
        roles=(
            Role("think", tags=(("<think>", "</think>"),)),
            Role("call", tags=(("<tool_call>", "</tool_call>"),)),
            Role("reply", author=Author.ENVIRONMENT),
            Role("seen", Modality.IMAGE, author=Author.ENVIRONMENT),
            Role("clip", Modality.VIDEO_FRAMES, author=Author.ENVIRONMENT),
            Role("error", author=Author.ENVIRONMENT),
            Role("answer", tags=(("<answer>", "</answer>"),)),
        ),
        follow={
            START: ("think",),
            "think": ("call", "answer"),
            "call": ("reply", "seen", "clip", "error"),
            "reply": ("think",),
            "seen": ("think",),
            "clip": ("think",),
            "error": ("think",),
            "answer": (END,),
        },
        max_images=0,
    )
)


def segment(text: str, role: str = "call") -> Segment:
    return Segment(role, Author.POLICY, Modality.TEXT, True, text=text)


@pytest.mark.parametrize(
    "text, role, names, expected",
    [
        ('<tool_call> {"name": "zoom", "arguments": {"box": [1, 2, 3, 4]}} </tool_call>', "call", ["look", "zoom"],
         ToolCall("zoom", {"box": [1, 2, 3, 4]}, '{"name": "zoom", "arguments": {"box": [1, 2, 3, 4]}}', "call")),
        ('<tool_call>{"name": "zoom"}</tool_call>', "call", ["zoom"], ToolCall("zoom", {}, '{"name": "zoom"}', "call")),
        ("<tool_call><zoom> 1 2 </zoom></tool_call>", "call", ["look", "zoom"], ToolCall("zoom", {}, "1 2", "call")),
        ('<tool_call><look>{"box": [1]}</look></tool_call>', "call", ["look", "zoom"],
         ToolCall("look", {"box": [1]}, '{"box": [1]}', "call")),
        ('<tool_call>{"box": [1]}</tool_call>', "call", ["zoom"], 
         ToolCall("zoom", {"box": [1]}, '{"box": [1]}', "call")),
        ("<tool_call> plain words </tool_call>", "call", ["zoom"], ToolCall("zoom", {}, "plain words", "call")),
        ("<think> a zoom", "think", ["zoom"], ToolCall("zoom", {}, "a zoom", "think")),  # its end is missing
    ],
)  # fmt: skip
def test_a_call_is_read(text, role, names, expected):
    assert parse_call(segment(text, role), CHAT, names) == expected


def test_a_role_s_own_tag_names_a_tool():
    fmt = get_format("look")
    call = parse_call(segment("<look> 1 2 3 4 </look>", "look"), fmt, ["zoom", "look"])
    assert call == ToolCall("look", {}, "1 2 3 4", "look")


@pytest.mark.parametrize(
    "text, names, message",
    [
        ('{"name": "zom"}', ["look", "zoom"], "there is no tool 'zom'; did you mean 'zoom'"),
        ('{"name": "zoom", "arguments": [1]}', ["zoom"], "arguments of 'zoom' are list; give an object"),
        ('{"name": zoom}', ["zoom"], "not JSON: Expecting value: line 1 column 10"),
        ("{" * 5000, ["zoom"], "not JSON"),
        ("words", ["look", "zoom"], "names no tool; write .* with one of look, zoom"),
        ('{"name": 3}', ["look", "zoom"], "names no tool"),
    ],
)
def test_what_is_no_call_is_an_error_for_the_model(text, names, message):
    with pytest.raises(ToolError, match=message):
        parse_call(segment(f"<tool_call>{text}</tool_call>"), CHAT, names)


@given(st.text(max_size=80))
def test_whatever_the_policy_writes_is_a_call_or_an_error(text):
    try:
        call = parse_call(segment(f"<tool_call>{text}</tool_call>"), CHAT, ["zoom"])
    except ToolError:
        return
    assert call.tool == "zoom" and call.role == "call"


def test_answers_are_told_in_the_roles_that_suit_them():
    role = {m: role_for(CHAT, "call", m) for m in (Modality.TEXT, Modality.IMAGE, Modality.VIDEO_FRAMES)}
    assert list(role.values()) == ["reply", "seen", "clip"]
    assert role_for(CHAT, "call", Modality.TEXT, error=True) == "error"
    look = get_format("look")
    assert role_for(look, "look", Modality.TEXT) == role_for(look, "look", Modality.TEXT, error=True) == "error"
    assert role_for(look, "look", Modality.VIDEO_FRAMES) == "crop" and role_for(look, "plan", Modality.TEXT) is None


# ---- look ----


def drawing() -> np.ndarray:
    """32 x 32, white, with a red square of 8 x 8 whose upper left corner is (8, 16)."""
    image = np.full((32, 32, 3), 255, np.uint8)
    image[16:24, 8:16] = (255, 0, 0)
    return image


def thought(*images: np.ndarray, shown: bool = False) -> Trajectory:
    segments = [Segment("prompt", Author.USER, Modality.TEXT, False, text="a red square")]
    segments += [Segment("sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, image=image) for image in images]
    if shown:
        segments.append(Segment("crop", Author.ENVIRONMENT, Modality.IMAGE, False, image=np.zeros((8, 8, 3), np.uint8)))
    return Trajectory("a red square", {}, "look", segments)


def look(body: str = "", trajectory: Trajectory | None = None, arguments=None, **options):
    call = ToolCall("look", arguments or {}, body, "look")
    return Look(LookOptions(**options)).call(call, trajectory or thought(drawing(), shown=True))


@pytest.mark.parametrize(
    "given",
    [
        {"body": "8 16 16 24"},
        {"body": "[8, 16, 16, 24]"},
        {"arguments": {"box": [8, 16, 16, 24]}},
        {"arguments": {"bbox_2d": ["8", "16", "16", "24"]}},
        {"body": "0.25 0.5 0.5 0.75", "frame": "fractions"},
    ],
)
def test_look_enlarges_a_part_of_the_policys_last_picture(given):
    (seen,) = look(**given)
    assert seen.shape == (32, 32, 3) and seen.dtype == np.uint8
    np.testing.assert_array_equal(seen, np.broadcast_to(np.array([255, 0, 0], np.uint8), (32, 32, 3)))


def test_a_box_grows_to_the_pictures_proportions_and_stays_inside():
    image = np.arange(6 * 12 * 3, dtype=np.uint8).reshape(6, 12, 3)
    # 4 x 1 of 12 x 6: the wider side decides, so 4 x 2, around the middle of row 5, kept inside of the picture
    np.testing.assert_array_equal(crop(image, (0, 5, 4, 6)), crop(image, (0, 4, 4, 6)))
    np.testing.assert_array_equal(crop(image, (0, 0, 12, 6)), image)


def test_a_box_that_reaches_out_is_cut_or_refused():
    np.testing.assert_array_equal(look("16 -8 99 16")[0], look("16 0 32 16")[0])
    with pytest.raises(ToolError, match="reaches out of the picture, which is 32 by 32"):
        look("16 -8 99 16", outside="error")


@pytest.mark.parametrize(
    "body, message",
    [
        ("", "four numbers"),
        ("1 2 3", "four numbers"),
        ("a red square .", "four numbers"),
        ("1 2 3 nan", "four numbers"),
        ("16 16 16 24", "the box is empty"),
        ("20 16 16 24", "the box is empty"),
        ("8 16 10 24", "too small: each side has at least 4 pixels"),
        ("40 40 50 50", "too small"),
    ],
)
def test_what_is_no_box_is_said(body, message):
    with pytest.raises(ToolError, match=message):
        look(body)


def test_there_must_be_a_picture_of_the_policys():
    with pytest.raises(ToolError, match="no picture to look at"):
        look("0 0 8 8", thought(shown=True))


@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4))
def test_every_box_gives_a_picture_or_an_error(box):
    try:
        (seen,) = look(arguments={"box": box})
    except ToolError:
        return
    assert seen.shape == (32, 32, 3)


# ---- the recipe ----


def test_tools_are_built_from_a_recipe(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    name, repeatable = 'mine', True\n    words = ['page']\n    open = None\n")
    tools = build_tools({"look": ToolConfig(options={"size": 16, "step": 8}), "mine": ToolConfig(tool=f"{file}:Mine")})
    assert list(tools.by_name) == ["look", "mine"] and tools.repeatable
    assert words_of(tools) == ["error:", "0", "8", "16", "look", "no", "picture", "box", "page"]
    assert build_tools({}) is None and words_of(None) == []
    fractions = build_tools({"look": ToolConfig(options={"size": 4, "step": 2, "frame": "fractions"})})
    assert words_of(fractions)[1:4] == ["0", "0.5", "1"]


@pytest.mark.parametrize(
    "configs, message",
    [
        ({"lok": {}}, r"no tool 'lok'; did you mean 'look'\? Known: look. One of your own is lok: {tool: package"),
        ({"look": {"options": {"sise": 3}}}, r"tools.look.options.sise: unknown key; did you mean 'size'"),
        ({"look": {"options": {"size": "big"}}}, r"tools.look.options.size: Input should be a valid integer.*'big'"),
        ({"x": {"tool": "nowhere.py:Tool"}}, r"tools.x.tool: 'nowhere.py:Tool': no file"),
        ({"x": {"tool": "tests.tool_helpers.Counter"}}, "has no 'open'"),
        ({"x": {"tool": "tests.tool_helpers.Counting", "options": {"a": 1}}}, "tools.x.options: the tool takes none"),
        ({"x": {"tool": "tests.tool_helpers.FileTool"}}, "tools.x.options.path: Field required"),
        ({"x": {"tool": "tests.tool_helpers.Raising"}}, "tools.x.tool: .* cannot be made: TypeError"),
    ],
)
def test_tools_that_cannot_be_had_are_named(configs, message):
    with pytest.raises(Exception, match=message) as caught:
        build_tools({name: ToolConfig(**config) for name, config in configs.items()})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "given, sentence",
    [
        ("look", "tools: a list of names, as in tools=[look], or a map of them to their keys is wanted, not a name "
         "(given: 'look')"),
        ("3", "tools: a list of names, as in [look], or a map of them to their keys is wanted: {look: {timeout_s: 5}}"),
        ("[{look: {}}]", "tools: a list of names, as in [look], or a map of them"),
        ("{look: 3}", "tools.look: Input should be a mapping of keys to values"),
        ("{look: {timeout: 3}}", "tools.look.timeout: unknown key; did you mean 'timeout_s'"),
    ],
)  # fmt: skip
def test_tools_on_the_command_line_are_a_list_or_a_map(given, sentence):
    with pytest.raises(RecipeError) as caught:
        load_recipe(ROOT / "configs/shapes/look.yaml", [f"tools={given}"])
    assert sentence in str(caught.value) and caught.value.exit_code == 2
    assert list(load_recipe(ROOT / "configs/shapes/look.yaml", ["tools=[look]"]).tools) == ["look"]


@pytest.mark.parametrize(
    "fmt, names, configs, message",
    [
        ("strokes", ["look"], {}, "no role of the format 'strokes' calls a tool, so 'look' would never be asked"),
        ("look", [], {}, "the role 'look' calls a tool, and there is none; name one, such as tools: .look."),
        ("look", ["look"], {"roles": ["lok"]}, "tools.look.roles: 'lok' is no role .* did you mean 'look'"),
    ],
)
def test_tools_that_do_not_fit_the_format_are_named(fmt, names, configs, message):
    tools = build_tools({name: ToolConfig(**configs) for name in names})
    with pytest.raises(ToolsError, match=message):
        check_fit(get_format(fmt), tools)


def test_every_role_that_calls_needs_a_tool_and_words_for_errors():
    def declared(*answers: Role, calls: int = 1) -> DeclaredFormat:
        names = tuple(role.name for role in answers)
        asks = [Role(f"ask{n}", tags=((f"<ask{n}>", f"</ask{n}>"),)) for n in range(calls)]
        end = Role("end_words", tags=(("<end>", "</end>"),))
        follow = {START: tuple(a.name for a in asks), "end_words": (END,)}
        follow |= {a.name: names for a in asks} | {name: ("end_words",) for name in names}
        return DeclaredFormat(Grammar("mine", (*asks, *answers, end), follow, 0))

    reply, seen = Role("reply", author=Author.ENVIRONMENT), Role("seen", Modality.IMAGE, author=Author.ENVIRONMENT)
    one = Tools([Counting()], {"counting": ToolConfig(roles=["ask0"])})
    check_fit(declared(reply), one)
    check_fit(get_format("look"), build_tools({"look": ToolConfig()}))
    check_fit(get_format("strokes"), None)
    check_fit(object(), None)  # a format that does not say what calls
    with pytest.raises(ToolsError, match="none answers the role 'ask1' .* `roles` of one of counting"):
        check_fit(declared(reply, calls=2), one)
    with pytest.raises(ToolsError, match="after 'ask0' the environment has no role for words"):
        check_fit(declared(seen), one)


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ToolsError, match="named alike"):
        Tools([Counting(), Counting()])


# ---- the contract test ----


def test_check_tool_lets_good_tools_pass():
    check_tool(Look(LookOptions()), ["0 0 8 8", '{"box": [0, 0, 16, 16]}', "nonsense"], thought(drawing()))
    check_tool(Counting(), ["a b", "a b c"], thought())
    check_tool(Blocking(0.01), [""], thought())
    check_tool(Raising(ToolError("no")), ["a"], thought())


class Forgetful(Counting):
    async def answer(self, call, trajectory):
        return [f"call {sum(self.calls.values())}"]


class Vandal(Counting):
    async def answer(self, call, trajectory):
        trajectory.segments.append(trajectory.segments[0])
        return []


class Selfish(Counting):
    async def answer(self, call, trajectory):
        import time

        time.sleep(0.8)
        return []


@pytest.mark.parametrize(
    "tool, message",
    [
        (Raising(ZeroDivisionError("x")), "the call 'a' raised ZeroDivisionError: x; raise ToolError"),
        (Hanging(), "the call 'a' took longer than 0.3 s"),
        (Replies(3), "counting answered with int"),
        (Replies("x" * 5000), "at most 4000"),
        (Forgetful(), "is `repeatable`, and the call 'a' was answered otherwise"),
        (Vandal(), "the call 'a' changed the trajectory"),
        (Selfish(), "blocks all other tools"),
        (object(), "has no 'name'"),
    ],
)
def test_check_tool_says_what_is_wrong(tool, message):
    with pytest.raises(AssertionError, match=message):
        check_tool(tool, ["a"], thought(), ToolConfig(timeout_s=0.3 if isinstance(tool, Hanging) else 5))
