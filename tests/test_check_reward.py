"""`check_reward`: every fault that a reward can have is named in words, and a sound one passes without any."""

from __future__ import annotations

import random
import sys
import textwrap
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from judge_server import JudgeServer

from rewards.check import check_reward
from rewards.config import RewardsConfig
from rewards.contract import RewardError, policy_text
from rewards.judge.base import AnswerCheck, Question
from rewards.judge.config import JudgeConfig
from rewards.manager import RewardManager
from rewards.samples import sample_thoughts
from runtime.errors import UserError


def words_in(completions):
    """The words of each completion, images left out."""
    said = []
    for messages in completions:
        parts = [
            p
            for m in messages
            for p in (m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}])
        ]
        said.append("".join(p["text"] for p in parts if p["type"] == "text"))
    return said


def brevity(completions, **columns):
    return [1 / (1 + len(said)) for said in words_in(completions)]


def written(folder, body, name="mine"):
    (folder / f"{name}.py").write_text(textwrap.dedent(body))
    return f"{folder / f'{name}.py'}:{name}"


SOUND = """
    import numpy as np

    def mine(completions, ground=250, **columns):
        values = []
        for messages in completions:
            parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
            images = [np.asarray(p["image"]) for p in parts if p["type"] == "image"]
            values.append(float((images[-1] >= ground).all(-1).mean()) if images else None)
        return values
"""


def test_a_sound_reward_in_a_file_has_no_problem(tmp_path):
    check = check_reward(written(tmp_path, SOUND), options={"ground": 240})
    assert check.ok and check.problems == ()
    assert check.scope == "row" and "say scope: row in the recipe" in " ".join(check.notes)
    assert [value is None for value in check.values] == [True, False, False, True, True, True, False, True]
    assert dict(zip(check.trajectories, check.values, strict=True))["an image alone"] == pytest.approx(1 - 64 / 1024)
    assert "keeps the contract" in str(check)


def test_a_function_of_a_module_is_tried_in_a_process_too():
    check = check_reward(brevity)
    assert check.ok, check.problems
    assert not any("process of its own" in note for note in check.notes)


def test_a_lambda_is_tried_here_and_says_so():
    check = check_reward(lambda completions, **columns: [1 / (1 + len(said)) for said in words_in(completions)])
    assert check.ok and any("put it into a file" in note for note in check.notes)


# ---- one fault each ---------------------------------------------------------------------------------------------


def too_few(completions, **columns):
    return [1.0] * (len(completions) - 1)


def not_a_list(completions, **columns):
    return 1.0


def no_numbers(completions, **columns):
    return [said[:3] for said in words_in(completions)]


def numbers_as_text(completions, **columns):
    return [str(len(said)) for said in words_in(completions)]


def not_a_number(completions, **columns):
    return [float("nan") if not said else len(said) for said in words_in(completions)]


def wants_words(completions, **columns):
    return [len(messages[0]["content"].split()) for messages in completions]


def wants_images(trajectories, **columns):
    return [float(t.images()[-1].mean()) for t in trajectories]


def chance(completions, **columns):
    return [random.random() for _ in completions]


def remembers(completions, seen=[], **columns):  # noqa: B006
    seen += completions
    return [float(len(seen)) for _ in completions]


def eight_alone(completions, **columns):
    if len(completions) < 8:
        raise ValueError("a step has eight")
    return [float(len(said)) for said in words_in(completions)]


def first_wins(completions, **columns):
    return [1.0 if index == 0 else 0.0 for index in range(len(completions))]


def lower_ground_truth(completions, ground_truth, **columns):
    return [
        float(truth.lower() in said.lower()) for said, truth in zip(words_in(completions), ground_truth, strict=True)
    ]


def scribbles(trajectories, **columns):
    for t in trajectories:
        t.record["seen"] = True
        for s in t.segments:
            s.text = s.text.strip() + "."
    return [float(len(t.segments)) for t in trajectories]


def paints(trajectories, **columns):
    values = []
    for t in trajectories:
        for image in t.images():
            image[0] = 0
        values.append(float(len(t.images())))
    return values


def asks_more(completions, difficulty, **columns):
    return [float(d) * len(said) for said, d in zip(words_in(completions), difficulty, strict=True)]


def wrong_segment(trajectories, **columns):
    return [{len(t.segments): 1.0} for t in trajectories]


def half_a_log(completions, log_extra, **columns):
    log_extra("length", [1.0])
    return [float(len(said)) for said in words_in(completions)]


def leaves(completions, **columns):
    sys.exit(1)


def leaves_alone(completions, **columns):
    if len(completions) == 1:
        sys.exit("alone")
    return [float(len(said)) for said in words_in(completions)]


class Tires:
    """Answers the first time only."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, completions, **columns):
        self.calls += 1
        if self.calls > 1:
            raise self.error
        return [float(len(said)) for said in words_in(completions)]


@pytest.mark.parametrize(
    "function, words",
    [
        (leaves, "it raises for every thought: SystemExit: 1 ("),
        (leaves_alone, "with 1 thought(s) in a call it raises, with 8 it does not: SystemExit: alone"),
        (too_few, "it returned 7 values for 8 completions"),
        (not_a_list, "it returned float; it must return a list with one value a completion"),
        (no_numbers, "it returned 'I d' for a completion; a value is a number, None"),
        (numbers_as_text, "for a completion; a value is a number, None, or {segment: number}"),
        (not_a_number, "it gives nan for an image alone; where there is nothing to judge, return None"),
        (
            wants_words,
            "it raises for an image alone and for words and an image and for several images of different "
            "sizes: AttributeError",
        ),
        (wants_images, "IndexError: list index out of range"),
        (chance, "called twice with the same thoughts it gives different values"),
        (remembers, "called twice with the same thoughts it gives different values"),
        (eight_alone, "with 1 thought(s) in a call it raises, with 8 it does not: ValueError: a step has eight"),
        (first_wins, "its values depend on the order of the groups in a call"),
        (lower_ground_truth, "it raises where a record lacks 'ground_truth': AttributeError: 'NoneType'"),
        (scribbles, "it changes the thoughts that it is given"),
        (paints, "it changes the thoughts that it is given"),
        (asks_more, "it asks for 'difficulty', which is no column of the thoughts it is tried on"),
        (wrong_segment, "it credits segment 3 of trajectory 0-0, which has segments 0 to 2"),
        (half_a_log, "it logs 1 values under 'length' with log_extra; give one a thought"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_what_is_wrong_is_said(function, words):
    check = check_reward(partial(function))  # which no recipe can name: no process is started for it
    assert not check.ok
    assert any(words in problem for problem in check.problems), check.problems
    assert words in str(check)


@pytest.mark.parametrize("error", [SystemExit(1), ValueError("tired")])
def test_what_raises_the_second_time_is_said(error):
    check = check_reward(Tires(error))
    assert any(f"called again with the same thoughts, it raises: {type(error).__name__}" in p for p in check.problems)


def one_by_one(completions, **columns):
    for said in words_in(completions):
        yield float(len(said))


def mapped(completions, **columns):
    return map(len, words_in(completions))


def too_few_one_by_one(completions, **columns):
    yield from [1.0] * (len(completions) - 1)


async def yields_later(completions, **columns):
    return (float(len(said)) for said in words_in(completions))


@pytest.mark.parametrize("function", [one_by_one, mapped, yields_later])
def test_values_may_come_one_by_one_as_they_may_in_a_run(function):
    check = check_reward(function)
    assert check.ok and len(check.values) == 8
    thoughts = sample_thoughts()
    part = {"function": f"{__name__}:{function.__name__}"}
    with RewardManager(RewardsConfig.model_validate({"parts": {"a": part}})) as manager:
        manager.score([thoughts[:4], thoughts[4:]])
    assert tuple(t.reward for t in thoughts) == check.values


def test_too_few_of_them_are_counted():
    assert check_reward(too_few_one_by_one).problems == (
        "it returned 7 values for 8 completions; it must return one a completion (None where it does not apply)",
    )


def test_an_example_of_a_column_is_enough():
    assert check_reward(partial(asks_more), columns={"difficulty": 2}).problems == (
        "it raises where a record lacks 'difficulty': TypeError: float() argument must be a string or a real number, "
        f"not 'NoneType' ({__file__}:{asks_more.__code__.co_firstlineno + 1}). The column is None there; return None "
        "for such a thought",
    )


# ---- in a process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, words",
    [
        (
            """
     import time
     def mine(completions, **columns):
         time.sleep(60)
     """,
            "longer than 1 s (it stood at ",
        ),
        (
            """
     import os
     def mine(completions, **columns):
         os._exit(3)
     """,
            "it ended its process (its process ended with exit code 3",
        ),
        (
            """
     import os
     HERE = os.getpid()
     SET_BY_OTHERS = int(os.environ.get("PYTEST_CURRENT_TEST") is not None)
     PARENT = os.path.basename(os.readlink("/proc/self/cwd"))
     import sys
     def mine(completions, **columns):
         return [float("pytest" in sys.modules) for _ in completions]
     """,
            "in a process of its own it gives other values than here",
        ),
        (
            """
     import threading
     class Odd(float):
         def __init__(self, x):
             self.lock = threading.Lock()
     def mine(completions, log_extra, **columns):
         log_extra("odd", [Odd(1.0) for _ in completions])
         return [float(index % 3) for index, _ in enumerate(completions)]
     """,
            "in a process of its own, where a run calls it, it raises: TypeError: cannot pickle",
        ),
    ],
    ids=["hangs", "exits", "depends", "does not travel"],
)
def test_what_only_a_process_shows(tmp_path, body, words):
    check = check_reward(written(tmp_path, body), timeout_s=1 if "sleep" in body else 20)
    assert any(words in problem for problem in check.problems), check.problems


def test_where_it_hung_is_the_users_line(tmp_path):
    spec = written(
        tmp_path,
        """
        import time
        def waits():
            time.sleep(60)
        def mine(completions, **columns):
            waits()
    """,
    )
    [problem] = check_reward(spec, timeout_s=1).problems
    assert 'mine.py", line 4 in waits' in problem


# ---- scope ------------------------------------------------------------------------------------------------------


def against_the_group(trajectories, **columns):
    lengths = [len(policy_text(t)) for t in trajectories]
    means = {
        g: np.mean([n for n, t in zip(lengths, trajectories, strict=True) if t.group == g])
        for g in {t.group for t in trajectories}
    }
    return [float(n - means[t.group]) for n, t in zip(lengths, trajectories, strict=True)]


def against_the_batch(trajectories, **columns):
    lengths = [len(policy_text(t)) for t in trajectories]
    return [float(n - np.mean(lengths)) for n in lengths]


@pytest.mark.parametrize(
    "function, scope", [(brevity, "row"), (against_the_group, "group"), (against_the_batch, "batch")]
)
def test_the_narrowest_scope_is_found_and_a_narrower_one_refused(function, scope):
    function = partial(function)
    assert check_reward(function).scope == scope
    order = ["row", "group", "batch"]
    for said in order:
        problems = check_reward(function, scope=said).problems
        if order.index(said) < order.index(scope):
            assert any(
                f"with scope: {said} each value may depend on" in p and f"say scope: {scope}" in p for p in problems
            )
        else:
            assert problems == ()


# ---- notes ------------------------------------------------------------------------------------------------------


def reads_everything(trajectories, **columns):
    return [float(sum(len(s.text) for s in t.segments[1:])) for t in trajectories]


def pays_nothing_for_none(completions, ground_truth, **columns):
    return [
        float(truth is not None and truth in said)
        for said, truth in zip(words_in(completions), ground_truth, strict=True)
    ]


def always_none(completions, **columns):
    return [None] * len(completions)


def always_one(completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "function, words",
    [
        (reads_everything, "its value changes with what the environment said"),
        (pays_nothing_for_none, "it pays 0 where a record lacks 'ground_truth'"),
        (always_none, "it gives None for every thought"),
        (always_one, "it gives 1 for every thought that it judges"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_what_is_worth_a_thought_is_a_note(function, words):
    check = check_reward(partial(function))
    assert check.ok and any(words in note for note in check.notes), check.sentences()


def length_of_strings(completions, **kwargs):
    """TRL's documented example for prompts that are strings."""
    return [float(len(c)) for c in completions]


def length_of_declared_strings(completions: list[str], **kwargs):
    return [float(len(c)) for c in completions]


def images_counted(trajectories, **columns):
    return [float(sum(s.image is not None for s in t.segments[1:])) for t in trajectories]


def blind_to_words(trajectories, **columns):
    return [float(t.images()[-1].mean()) if t.images() else None for t in trajectories]


BLIND = "stay the same when every word and every image that the policy wrote is another"


def test_a_reward_that_counts_messages_is_told_of_strings():
    """The words around an observation are two messages, so that its values are no constant."""
    check = check_reward(length_of_strings)
    assert set(check.values) == {1.0, 2.0}
    told = [note for note in check.notes if BLIND in note]
    assert len(told) == 1 and told[0].endswith("wants completions: strings")
    one_message_each = [t for t in sample_thoughts() if "observation" not in t.info["kind"]]
    (told,) = [
        note for note in check_reward(length_of_strings, trajectories=one_message_each).notes if "gives 1" in note
    ]
    assert told.endswith("wants completions: strings")


def test_with_strings_it_reads_the_words():
    lengths = [float(len(policy_text(t))) for t in sample_thoughts()]
    for check in (
        check_reward(length_of_strings, completions="strings"),
        check_reward(length_of_declared_strings),
        check_reward(length_of_strings, trajectories=[without_images(t) for t in sample_thoughts()]),
    ):
        assert check.ok and list(check.values) == lengths and not any(BLIND in note for note in check.notes)


def without_images(trajectory):
    return replace(trajectory, segments=[s for s in trajectory.segments if s.image is None or s.author != "policy"])


def shown_to_a_judge(trajectories, judge):
    asked = [Question.of("Is it fine?", [image]) for t in trajectories for image in t.images()[-1:]]
    said = iter(judge.yes_probability(asked))
    return [next(said) if t.images() else None for t in trajectories]


def test_what_a_made_up_judge_says_of_images_is_not_held_against_a_reward():
    assert not any(BLIND in note for note in check_reward(shown_to_a_judge).notes)


def test_what_reads_only_the_shape_of_a_thought_is_told_so():
    (told,) = [note for note in check_reward(images_counted).notes if BLIND in note]
    assert "strings" not in told  # it reads no completions
    for function in (blind_to_words, brevity, reads_everything):  # pixels alone; words alone; through an annotation
        assert not any(BLIND in note for note in check_reward(function).notes)


def test_a_text_reward_of_trl_passes():
    check = check_reward("trl.rewards.think_format_reward")
    assert check.ok, check.problems


class Counting:
    def __init__(self, word="the"):
        self.word = word

    def __call__(self, completions, **columns):
        return [float(said.count(self.word)) for said in words_in(completions)]


def test_a_factory_is_made_with_its_options():
    check = check_reward(f"{__name__}.Counting", factory=True, options={"word": "star"})
    assert check.ok and max(check.values) >= 1


async def later(completions, **columns):
    return [float(len(said)) for said in words_in(completions)]


def test_an_async_reward_passes():
    assert check_reward(later).ok


def agreed(trajectories, judge, ground_truth, **columns):
    """Asks a judge, and hands on what it could not judge."""
    checks = [
        AnswerCheck(t.prompt, policy_text(t), str(truth)) for t, truth in zip(trajectories, ground_truth, strict=True)
    ]
    return [None if said is None else float(said) for said in judge.agrees(checks)]


def agreed_or_wrong(trajectories, judge, **columns):
    return [float(said) for said in judge.yes_probability([Question.of(policy_text(t)) for t in trajectories])]


def test_a_reward_with_a_judge_is_tried_with_a_stand_in_or_an_endpoint():
    check = check_reward(agreed)
    assert check.ok and any("its judge is a stand-in" in note for note in check.notes)
    assert {0.0, 1.0} <= set(check.values)
    with JudgeServer(lambda body, _: "yes" if "circle" in body["messages"][-1]["content"] else "no") as server:
        check = check_reward(agreed, judge=JudgeConfig(base_url=server.url, model="judge"))
    assert check.ok and check.values == (1.0,) * 4 + (0.0,) * 4
    assert check.scope == "row" and not any("stand-in" in note for note in check.notes)


def test_a_stand_in_leaves_questions_unjudged_as_a_judge_does():
    [problem] = [p for p in check_reward(partial(agreed_or_wrong)).problems if "raises for" in p]
    assert "TypeError: float() argument must be" in problem and "return None for what it does not apply to" in problem


# ---- what cannot be checked at all ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, words",
    [
        ("def mine(completions)\n    return []", "mine.py, line 1: expected ':'"),
        (
            "import nothing_like_it\ndef mine(completions):\n    return []",
            "mine.py does not import: ModuleNotFoundError",
        ),
        ("def yours(completions):\n    return []", "has no function 'mine'"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path, body, words):
    with pytest.raises(UserError, match=words.replace("(", "\\(")):
        check_reward(written(tmp_path, body))


def test_an_unknown_option_is_named(tmp_path):
    with pytest.raises(RewardError, match="'gruond' is no argument of the function"):
        check_reward(written(tmp_path, "def mine(completions, ground=1):\n    return []"), options={"gruond": 2})


def test_the_toolkits_own_are_refused():
    with pytest.raises(UserError, match="'geneval' is one of the toolkit's own"):
        check_reward("geneval")


def test_the_sample_is_what_it_says():
    thoughts = sample_thoughts({"level": 3})
    assert [t.group for t in thoughts] == [0] * 4 + [1] * 4
    assert all(t.record["level"] == 3 and t.prompt == t.record["prompt"] for t in thoughts)
    assert len({t.info["kind"] for t in thoughts}) == 8
    assert any(s.author == "environment" for t in thoughts for s in t.segments)
