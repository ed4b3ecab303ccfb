"""This toolkit's own rewards: the name a recipe writes, where the function is, its formula and its source.

Only for these is a name enough; anybody else's function is named by path (loader.py). Where `place` is "driver" a
reward is bounded, makes no network call, and shares one detection of each image with the others; one that calls a
judge or a library with time limits of its own has the place "process".
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import UserError, nearest
from runtime.loading import load_object

# Options of the toolkit's own rewards that name a column.
COLUMN_OPTIONS = (
    "gold",
    "kind_column",
    "size",
    "policy_size",
    "duration",
    "fps",
    "video",
    "file",
    "pages",
    "without",
    "with_tools",
    "outputs",
)


@dataclass(frozen=True)
class Registered:
    name: str
    function: str  # "module:function"
    formula: str
    source: str
    inputs: str = ""  # the record's columns and what else it reads
    differs: str = ""  # what its variants do differently, where the release departs from the paper or has a known bug
    needs_detector: bool = False
    by_geneval: bool = False  # judges records by GenEval's rule, which knows four relations and the detector's colors
    needs_judge: bool = False
    judge_needs: tuple[Literal["images", "logprobs"], ...] = ()  # what its questions ask for beside words
    scope: Literal["row", "group", "batch"] = "row"  # what a value may depend on: its trajectory, its group, the step
    runs_on: Literal["driver", "process"] = "driver"
    columns: tuple[str, ...] = ()  # without which it judges no row: a column, or the option that names one

    def load(self) -> Any:
        return load_object(self.function, f"reward '{self.name}'")

    def check_columns(self, function: Any, part: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
        """Raises UserError where no record has a column that it needs, or one that an option of the recipe names."""
        parameters = inspect.signature(function).parameters
        given = {name: options[name] for name in COLUMN_OPTIONS if options.get(name) and name in parameters}
        needed = {name: parameters[name].default if name in parameters else name for name in self.columns}
        for name, column in (needed | given).items():
            if column not in known:
                option = f" (option {name})" if name in parameters else ""
                raise UserError(
                    f"rewards.parts.{part}: '{self.name}' reads the column '{column}'{option}, which no record has; "
                    f"{nearest(str(column), known)}"
                )


def _by_name(*rewards: Registered) -> dict[str, Registered]:
    return {reward.name: reward for reward in rewards}


_CHAIN_OF_FOCUS = (
    "repaired (default) reads the policy's words alone without chat marks, takes a missing or blank answer as wrong "
    "and badly formed and asks nothing about it, compares by math-verify, and leaves the unjudged None; release reads "
    "the tools' replies as well, asks about a missing or blank answer (math: does not), pays the format of a blank "
    "one, and an unread judge as wrong. In both an answer of over 1,000 words is badly formed, right or not"
)

REWARDS: dict[str, Registered] = _by_name(
    Registered(
        "geneval",
        "rewards.functions.geneval:geneval",
        "1 if the final image meets the record, else 0; graded: the share of it that is met, in [0, 1]",
        "GenEval, arXiv:2310.11513, section 3.2; djghosh13/geneval evaluation/evaluate_images.py",
        inputs="the record in GenEval's schema (tag, include, exclude); the final, first or each image",
        differs="standard is the released scorer; strict wants exact counts and ignores exclude; graded and "
        "graded_strict are bounded shares; flow_grpo is that reward server's graded score",
        needs_detector=True,
        by_geneval=True,
        columns=("include",),
    ),
    Registered(
        "critique_consistency",
        "rewards.functions.critique_consistency:critique_consistency",
        "mean over inspections of +-min(f, w)/f for images that are fine and +-min(f, w)/w for wrong ones, "
        "with f and w their shares in the batch; + where the verdict is right",
        "this project; the weights are those of Youden's J (Cancer 3:32, 1950)",
        inputs="the record in GenEval's schema; the plan, and each inspection with the image before it; a "
        "task that reads them (claims, requirement, holds, seen_in)",
        needs_detector=True,
        by_geneval=True,
        scope="batch",
        columns=("include",),
    ),
    Registered(
        "improvement",
        "rewards.functions.improvement:improvement",
        "graded score of the final image less that of the first, in [-1, 1]",
        "this project",
        inputs="the record in GenEval's schema; the first and final image, or each",
        needs_detector=True,
        by_geneval=True,
        columns=("include",),
    ),
    Registered(
        "steps",
        "rewards.functions.steps:steps",
        "1 less penalties for images and turns outside their limits and for being cut off, at least 0",
        "this project",
        inputs="the number of the policy's images and of its stretches of words; what ended the thought",
    ),
    Registered(
        "format",
        "rewards.functions.format:format_reward",
        "1 if the thought is a sentence of its format, else 0; graded: the share of well-formed segments",
        "this project; the rule is the Format's own",
        inputs="the policy's segments, in order",
    ),
    # ---- images that were drawn
    Registered(
        "flow_grpo_geneval",
        "rewards.published.flow_grpo:flow_grpo_geneval",
        "mean over clauses of 1 - |n - found| / n, of 1 - |n - hits| / n for colors, and of places; at most 1, "
        "unbounded below",
        "Flow-GRPO, arXiv:2505.05470; yifan123/reward-server reward_server/gen_eval.py",
        inputs="the record in GenEval's schema; the final, first or each image",
        differs="as released: five found for one wanted pay -3, a wrong place adds a 0 and still the 1 for a "
        "right one; geneval with mode graded or graded_strict has neither",
        needs_detector=True,
        by_geneval=True,
        columns=("include",),
    ),
    Registered(
        "t2i_r1_detector",
        "rewards.published.t2i_r1:t2i_r1_detector",
        "spatial: 0.2 an object found + 0.5 relation; numeracy: mean of 1 exact, 0.2 other, 0 none; objects: "
        "share found",
        "T2I-R1, arXiv:2505.00703; CaraJ7/T2I-R1 src/t2i-r1/src/utils/reward_gdino.py",
        inputs="columns object_1, object_2, relation, or counts, or objects, or GenEval's include; the final image",
        differs="repaired (default): above and on top of are paid, near is measured in px, suppression on "
        "corners; release has the three faults",
        needs_detector=True,
    ),
    Registered(
        "t2i_r1_yes",
        "rewards.published.t2i_r1:t2i_r1_yes",
        "mean over the record's phrases of P(yes) / (P(yes) + P(no)) that the image shows them",
        "T2I-R1, arXiv:2505.00703; CaraJ7/T2I-R1 src/t2i-r1/src/utils/reward_git.py",
        inputs="columns task, phrases, objects; the final image",
        differs="repaired (default) is None for prompts about places and counts; release pays them 0",
        needs_judge=True,
        judge_needs=("images", "logprobs"),
        runs_on="process",
    ),
    Registered(
        "janus_pro_r1",
        "rewards.published.janus_pro_r1:janus_pro_r1",
        "draw: P(yes) of the first image; self-check: 1 - |P(yes) - said yes|; redraw: P(yes) of the final "
        "image; each credits its segment",
        "Janus-Pro-R1, arXiv:2506.01480; wendell0218/Janus-Pro-R1 janus-rl/src/open_r1/grpo_trainer_t2iv1.py",
        inputs="the prompt; first and final image, and the check between them",
        differs="an image that was not scored is None, where the release's scorer in process leaves 0 and "
        "so pays for saying no",
        needs_judge=True,
        judge_needs=("images", "logprobs"),
        runs_on="process",
    ),
    Registered(
        "janus_pro_r1_geneval",
        "rewards.published.janus_pro_r1:janus_pro_r1_geneval",
        "as janus_pro_r1, with GenEval's graded score in place of P(yes)",
        "Janus-Pro-R1, arXiv:2506.01480; the score is this project's",
        inputs="the record in GenEval's schema; first and final image, and the check between them",
        needs_detector=True,
        by_geneval=True,
        columns=("include",),
    ),
    Registered(
        "got_r1",
        "rewards.published.got_r1:got_r1",
        "mean over planned boxes of their IoU with the box of the object found for them (the factor R_RI of "
        "R_PI * (R_sem + R_spa) * R_RI)",
        "GoT-R1, arXiv:2505.17022, and the README of gogoduan/GoT-R1; pairing and mean are this project's",
        inputs="boxes in the policy's words before the final image; the final image",
        needs_detector=True,
    ),
    Registered(
        "clip_similarity",
        "rewards.functions.clip_similarity:clip_similarity",
        "cosine of the prompt's and the image's embedding, in [-1, 1]; clipscore: 2.5 max(cosine, 0)",
        "CLIP, arXiv:2103.00020; CLIPScore, arXiv:2104.08718, equation 1",
        inputs="the prompt; the final image",
        runs_on="process",
    ),
    Registered(
        "pickscore",
        "rewards.functions.preference:pickscore",
        "exp(logit scale) * cosine of prompt and image / divisor",
        "PickScore, arXiv:2305.01569, equation 1; the divisor 26 is flow_grpo's",
        inputs="the prompt; the final image",
        runs_on="process",
    ),
    Registered(
        "hps",
        "rewards.functions.preference:hps",
        "cosine of prompt and image under HPS v2.1's weights",
        "HPS v2, arXiv:2306.09341; as used by T2I-R1",
        inputs="the prompt; the final image",
        runs_on="process",
    ),
    # ---- answers, and thinking with images by tools
    Registered(
        "answer",
        "rewards.functions.answers:answer",
        "how right the final answer is, in [0, 1], by kind: math, choice, exact, f1, anls or numeric; 0 without one",
        "math-verify; SQuAD, arXiv:1606.05250 (exact, f1); ANLS, arXiv:1905.13648; ChartQA, arXiv:2203.10244",
        inputs="column ground_truth (or a list of references); the policy's own words",
        differs="signs, points and bars of numbers stay, which SQuAD's normal form drops; bold type, LaTeX around "
        "words and other forms of a character cost nothing; of several options named none is taken",
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "deepeyes",
        "rewards.published.deepeyes:deepeyes",
        "0.8 accuracy + 0.2 format + 1.2 tool (math: 1.2 accuracy + 0.4 format); format in {0, -1}; tool 1 "
        "only for a right answer with a returned image",
        "DeepEyes, arXiv:2505.14362; Visual-Agent/DeepEyes verl/utils/reward_score/vl_agent.py",
        inputs="columns ground_truth, question; the policy's words; images that tools returned",
        differs="repaired (default) reads the policy's words alone without chat marks (its answer: not before the "
        "last observation), takes a missing or blank answer as wrong and badly formed and asks nothing about it, "
        "matches braces of a box, compares by math-verify, and leaves the unjudged None; release reads the tools' "
        "replies as well, judges whole text without an answer tag, cuts a box at its first brace, pays an unread "
        "judge as wrong. In both an answer of 1,000 characters or more is wrong and badly formed",
        needs_judge=True,
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "deepeyes_v2",
        "rewards.published.deepeyes_v2:deepeyes_v2",
        "0.8 accuracy + 0.2 format; search: 0.9 of the accuracy once a call occurs",
        "DeepEyesV2, arXiv:2511.05271; Visual-Agent/DeepEyesV2 "
        "reinforcement_learning/verl/utils/reward_score/deepeyesv2.py",
        inputs="columns ground_truth, question; the policy's words",
        differs="repaired (default) reads the policy's words alone without chat marks (its answer: not before the "
        "last observation), asks nothing about a missing or blank answer, and leaves the unjudged None; release "
        "reads the tools' replies as well, asks all the same, and pays an unread judge as wrong. In both an answer "
        "of 300 characters or more is wrong and badly formed",
        needs_judge=True,
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "thyme",
        "rewards.published.thyme:thyme",
        "result * (1 + 0.5 consistency) + 0.5 format",
        "Thyme, arXiv:2508.11630; yfzhang114/Thyme examples/train/grpo/plugin/agent_rm.py",
        inputs="columns ground_truth, question; the policy's words",
        differs="paper (default): result in {0, 1}, a missing answer is wrong; release: result + consistency + "
        "format with result in {1, 0, -1}, where a missing or unjudged answer is paid better than a "
        "wrong one and the sandbox's words count",
        needs_judge=True,
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "chain_of_focus",
        "rewards.published.chain_of_focus:chain_of_focus",
        "by the group: direct right 1; zoom right 0.8, or 1 if no direct one is; zoom wrong 0.5; direct wrong "
        "0, or 0.1 in good format",
        "Chain-of-Focus, arXiv:2505.15436; xtong-zhang/Chain-of-Focus verl/verl/trainer/ppo/core_algos.py",
        inputs="columns ground_truth, question; the policy's words and tool calls",
        differs="repaired (default) leaves unjudged members out and applies the table to groups of one; release keeps "
        "a lone member's base score. Of the base score: " + _CHAIN_OF_FOCUS,
        needs_judge=True,
        scope="group",
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "chain_of_focus_base",
        "rewards.published.chain_of_focus:chain_of_focus_base",
        "0.9 accuracy + 0.1 format, before the group is looked at",
        "Chain-of-Focus, arXiv:2505.15436; xtong-zhang/Chain-of-Focus verl/recipe/zoomin/zoomin_reward3.py",
        inputs="columns ground_truth, question; the policy's words",
        differs=_CHAIN_OF_FOCUS,
        needs_judge=True,
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "pixel_reasoner",
        "rewards.published.pixel_reasoner:pixel_reasoner",
        "r + 0.5 max(0.3 - rate, 0) [n > 0] + 0.05 min(1 - n, 0); n operations, rate the share of the prompt's "
        "thoughts that have any",
        "Pixel Reasoner, arXiv:2505.15966; TIGER-AI-Lab/Pixel-Reasoner "
        "curiosity_driven_rl/openrlhf/trainer/ppo_utils/experience_maker.py; TIGER-AI-Lab/verl-tool "
        "verl_tool/workers/reward_manager/pixel_reasoner.py",
        inputs="column ground_truth (or a list); the policy's boxed answer and tool calls; column is_video "
        "(release_official)",
        differs="release_official: 0.25 max(0.3 - rate, 0) / (c rate) - 0.05 (n - 1), an answer that cannot be "
        "read pays -1, every group is read by the first group's failure flags; release_verl_tool: the "
        "paper's shaping, words compared as products of letters",
        scope="batch",
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "vtool_r1",
        "rewards.published.vtool_r1:vtool_r1",
        "1 if a judge finds the final answer right, else 0",
        "VTool-R1, arXiv:2505.19255; VTool-R1/VTool-R1 examples/reward_function/refocus_llm.py; "
        "VTool-R1/training-v2 recipe/vtool/reward_utils.py",
        inputs="columns ground_truth, question; the policy's words",
        differs="repaired (default): the last answer of the policy's own words; release_v1 misses an answer "
        "that other lines follow; release_v2 takes the conversation's first, or the whole text",
        needs_judge=True,
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "vtool_r1_similarity",
        "rewards.published.vtool_r1:vtool_r1_similarity",
        "parts matched one to one, each 1 - |a - b| / max(|a|, |b|) or 1 if equal, over the larger number of parts",
        "VTool-R1, arXiv:2505.19255; VTool-R1/VTool-R1 examples/reward_function/refocus.py",
        inputs="column ground_truth, parts parted by |||; the policy's words",
        differs="release_v1 adds up the answer's parts over the reference's, so that repeating one pays more than 1",
        columns=("gold",),
    ),
    # ---- overlap and length
    Registered(
        "box_iou",
        "rewards.functions.overlap:box_iou_reward",
        "IoU of the answered boxes with the true ones, matched one to one, over the larger number; in [0, 1]",
        "PASCAL VOC, IJCV 88(2), 2010 (IoU); the matching is this project's",
        inputs="columns ground_truth (a box or a list), image_size where frames differ; the policy's answer",
        columns=("gold",),
    ),
    Registered(
        "temporal_iou",
        "rewards.functions.overlap:temporal_iou_reward",
        "seconds in both the answered and the true stretches of time over seconds in either, in [0, 1]",
        "TALL, arXiv:1705.02101 (temporal IoU)",
        inputs="columns ground_truth ([start, end] or a list), duration or fps where frames differ; the "
        "policy's answer",
        columns=("gold",),
    ),
    Registered(
        "repetition_penalty",
        "rewards.functions.length:repetition_penalty",
        "-penalty * (1 - distinct n-grams / n-grams) of the policy's words, tags left out",
        "this project; the share is that of Open-R1's repetition penalty",
        inputs="the policy's words",
    ),
    Registered(
        "overlong_penalty",
        "rewards.functions.length:overlong_penalty",
        "0 up to max_length - cache, then down by 1/cache a token to -1 at max_length",
        "DAPO, arXiv:2503.14476, equation 13",
        inputs="the policy's words, counted in sampled tokens",
    ),
    Registered(
        "length_penalty",
        "rewards.functions.length:length_penalty",
        "0.5 - (length - shortest) / (longest - shortest) within the group; 0 where all are equally long",
        "Kimi k1.5, arXiv:2501.12599, section 2.3.3",
        inputs="the policy's words, counted in sampled tokens, of the whole group",
        scope="group",
    ),
    # ---- thinking with images, continued
    Registered(
        "vrag",
        "rewards.published.vrag:vrag",
        "0.7 judge + 0.1 format + 0.2 NDCG of the retrieved pages; 0 without a search and an answer block; in "
        "evaluation the verdict alone",
        "VRAG-RL, arXiv:2505.22019; Alibaba-NLP/VRAG VRAG-RL/verl/workers/reward_manager/rm.py",
        inputs="columns ground_truth, question, file_name, reference_pages; the policy's words; the pages that "
        "the search tool returned (info['retrieved'])",
        differs="repaired (default) reads the policy's words alone, counts each page once, asks nothing about a blank "
        "answer (it is wrong) and leaves the unjudged None; release reads tags in user turns too, pays a page again "
        "each time it is retrieved (NDCG above 1), and pays a failed judge as wrong",
        needs_judge=True,
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "visual_arft",
        "rewards.published.visual_arft:visual_arft",
        "accuracy + format of one step; accuracy by the reference's tag: F1 (answer), 1 / 0.5 / 0 (problem), "
        "0.9 (code that ran), cosine from 0.5 on (search)",
        "Visual-ARFT, arXiv:2505.14246; Liuziyu77/Visual-RFT "
        "Visual-ARFT/src/visual_arft/src/open_r1/grpo_agent_{code,search}.py",
        inputs="column ground_truth with its tag; the policy's step; whether its code ran",
        differs="repaired (default) pays code only if the environment ran it without an error (None if nobody "
        "ran it), counts repeated words in F1, needs the tags, also around several lines, overlooks white space at "
        "the ends, wants the form of the reference's step, and pays either of two rotations for half; release pays "
        "0.9 for any text, counts shared words once, compares whole texts without tags, and in search tries "
        "math-verify over them first and takes the form of either step",
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "openthinkimg",
        "rewards.published.openthinkimg:openthinkimg",
        "accuracy in {0, 1} of the Terminate action's answer; format (weight 0 by default) = share of turns "
        "with a JSON object that has a thought or actions",
        "OpenThinkIMG, arXiv:2505.08617; OpenThinkIMG/OpenThinkIMG r1_v/open_r1/tool_grpo.py",
        inputs="column ground_truth; the policy's turns",
        differs="repaired (default) reads the answer of the Terminate action wherever it is in the last turn "
        "and nothing else, and compares words but for case and white space; release gives the whole turn to "
        "math-verify first, reads the first action only, and stops where there is no list of turns",
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "vista",
        "rewards.published.vista:vista",
        "1 if a frozen model is right with the tools that the policy picked, -0.5 if only without them, else 0",
        "VisTA, arXiv:2505.20289; OoDBag/VisTA vista/src/r1-v/src/open_r1/grpo.py",
        inputs="columns ground_truth, question, and answer_without_tools and answers_with_tools, or "
        "tool_outputs and a judge's endpoint that serves the frozen model; the policy's words",
        differs="repaired (default) leaves a row None where the frozen model did not answer, reads the last answer "
        "block of either, takes a pick of no tool as the same question twice, and compares numbers as numbers and "
        "words but for articles and marks; release pays an unanswered one 0, reads the first block after the word "
        "assistant, stops on a question not found exactly once, drops signs, and has a format part that is always 0",
        needs_judge=True,
        judge_needs=("images",),
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "vital",
        "rewards.published.vital:vital",
        "accuracy + format + tool; a stretch of time is paid clamp((IoU - low) / (high - low), 0, 1) with the "
        "bounds of its task",
        "VITAL, arXiv:2508.04416; no code was available, so the paper's formula",
        inputs="columns ground_truth ([start, end] or an answer), task; the policy's words; its calls",
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "vital_weight",
        "rewards.published.vital:vital_weight",
        "0.5 + 0.5 clamp(2 - mean R, 0, 1) with the mean of `vital` over the group: a factor for `vital`; "
        "needs grpo.scale_rewards: none or batch, for group divides it out again",
        "VITAL, arXiv:2508.04416 (DGRPO's sample weight); no code was available, so the paper's formula",
        inputs="as vital, for the whole group",
        scope="group",
        runs_on="process",
        columns=("gold",),
    ),
    Registered(
        "vr_thinker",
        "rewards.published.vr_thinker:vr_thinker",
        "format + accuracy + 0.2 * sum of accuracy's steps over rounds + 0.5 * max(0.2 - share of the group "
        "that looked, 0) for those that looked; accuracy = 0.5 overall + 0.5 share of dimensions",
        "VR-Thinker, arXiv:2510.10518, section 3.2.2 and appendix A.2, B.1; no code was available, so the "
        "paper's formula",
        inputs="column ground_truth {OA, and a dimension's two letters: 0, 1 or 2}; the policy's turns and calls",
        scope="group",
        columns=("gold",),
    ),
    Registered(
        "vprl",
        "rewards.published.vprl:vprl",
        "for each image drawn +1 if it is a possible step towards the goal, 0 another possible step, -5 else",
        "VPRL, arXiv:2505.11409; no training code was available, so the paper's formula",
        inputs="a task that is a world to plan in (rewards/published/vprl.py: World); the policy's images",
    ),
)
