"""What a recipe may say about GRPO: names, defaults and meanings are those of TRL's GRPOConfig wherever it has them.

Departures are named in the descriptions: `loss_type` knows two more values and defaults to one of them, the
learning rate holds constant after its warmup, and clip ranges may differ by kind of decision.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from formats.roles import WRITTEN
from runtime.section import Section
from training.schedules import Schedule, check_schedule

Kind = Literal["word", "code", "flow"]
LossType = Literal["segment", "modality", "token", "grpo", "dr_grpo", "dapo", "bnpo"]


class ClipConfig(Section):
    """A clip range for one kind of decision."""

    epsilon: float = Field(0.2, ge=0, description="Lower clip range: ratios below 1 - epsilon are clipped.")
    epsilon_high: float | None = Field(None, ge=0, description="Upper clip range; None: the same as epsilon.")
    delta: float | None = Field(
        None,
        gt=1,
        description="Two-sided clipping: the largest ratio that an unclipped term may have. None: no such bound.",
    )

    @model_validator(mode="before")
    @classmethod
    def _range_alone(cls, data: Any) -> Any:
        return {"epsilon": data} if isinstance(data, int | float) and not isinstance(data, bool) else data


class ForkConfig(Section):
    """Candidates at a state: members that continue from where a member began a segment."""

    roles: Annotated[list[str], WRITTEN] = Field(
        min_length=1, description="Candidates are written where one of these roles began."
    )
    candidates: int = Field(
        4, ge=2, le=65536, description="Continuations of one state. They are each other's baseline, and a group more."
    )
    members: int = Field(1, ge=1, description="Members of each group whose states are continued, the first ones.")
    occurrences: int | None = Field(
        None, ge=1, description="States of a member that are continued, the first ones. None: all of its states."
    )


class ImageCreditConfig(Section):
    """Credit for pictures: the reward less that of the same thought gone on from another picture in its place."""

    arms: list[Literal["sibling", "blank", "other"]] = Field(
        ["sibling"],
        min_length=1,
        description="What stands in a picture's place. sibling: what another member of the group drew in the same role "
        "and occurrence. blank: a white picture. other: what a member of another prompt's group drew there. Each is "
        "rolled out for each picture, and the worths are averaged.",
    )
    draws: int = Field(
        1,
        ge=1,
        le=1024,
        description="Continuations of each picture and arm, under as many noises. The first is the noise that the "
        "thought itself went on with; each further one asks for a continuation of the thought's own picture too.",
    )
    weight: float = Field(
        1.0,
        gt=0,
        description="Factor on a picture's worth, which is divided by the root mean square of the step's worths "
        "(scale_rewards: none: by 1) and added to the advantage of its segment.",
    )
    members: int | None = Field(
        None, ge=1, description="Members of each group whose pictures are credited, the first ones. None: all."
    )

    @field_validator("arms")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        again = [arm for arm in dict.fromkeys(value) if value.count(arm) > 1]
        if again:
            raise ValueError(f"'{again[0]}' stands there twice; name each arm once")
        return value


class RestartConfig(Section):
    """Groups that begin from a picture of the latest steps: reflect on it, then leave it or redraw it."""

    roles: Annotated[list[str], WRITTEN] = Field(
        min_length=1, description="Images of these roles are begun from: the first one of each thought that went on."
    )
    share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Of a step's groups. At least one of them begins at its prompt, so that there are new pictures.",
    )
    every: int = Field(
        1, ge=1, description="Only steps whose number is a multiple of this. R3 alternates: 2, share near 1."
    )
    steps: int = Field(1, ge=1, description="Of how many of the latest steps that drew pictures these are kept.")
    perfect_share: float = Field(
        0.15, ge=0, le=1, description="With this probability a group begins from a perfect picture, else from another."
    )
    perfect: float = Field(1.0, description="A picture is perfect whose own reward is at least this.")
    part: str | None = Field(
        None,
        description="The reward part by which pictures and results are compared, such as one that judges the last "
        "image alone. None: the recipe's total, of which a picture by itself may earn less for its form.",
    )
    reward: Literal["improvement", "result"] = Field(
        "improvement",
        description="improvement: the result's reward less the picture's; from a perfect picture the result's own; to "
        "leave one that is not perfect costs what it lacks (the reward less `perfect`). result: the recipe's reward as "
        "it is.",
    )


class FlowLossConfig(Section):
    """Ratios and divergences of denoising steps: rl/flow_losses.py defines them."""

    ratio: Literal["plain", "guard"] = Field(
        "plain",
        description="plain: Flow-GRPO's. guard: GRPO-Guard's RatioNorm, and weights by the step's size "
        "(arXiv:2510.22319).",
    )
    anchor: Literal["mean_kl", "velocity_mse"] = Field(
        "mean_kl",
        description="The divergence that grpo.beta weighs. mean_kl: of the step's Gaussian from the reference's, exact "
        "(Flow-GRPO). velocity_mse: squared distance of the velocities (UniGRPO).",
    )
    variant: Literal["repaired", "shared_scale", "release"] = Field(
        "repaired",
        description="Of RatioNorm and of mean_kl. repaired: each step by itself. shared_scale (RatioNorm alone): one "
        "scale for all steps of a forward pass, as in verl-omni. release: as the authors have them, faults included.",
    )


# Ratios of denoising steps are means over a latent's elements and stay near 1: the releases' clip ranges.
FLOW_EPSILON = {"plain": 1e-4, "guard": 2e-6}


class GrpoConfig(Section):
    """The section `grpo` of a recipe."""

    # The loop
    steps: int = Field(100, ge=1, description="Steps of the loop: each rolls out, judges and updates once.")
    prompts_per_step: int = Field(16, ge=1, le=2**20, description="Prompts rolled out a step; each makes one group.")
    shuffle_dataset: bool = Field(
        True, description="Draw prompts in a seeded permutation an epoch; false: in the task's own order."
    )
    max_rollout_rounds: int = Field(
        1,
        ge=1,
        description="Rounds of rollouts a step. With more than 1, a group that is dropped (no variance, unjudged, "
        "failed) is replaced by a group of the next prompt, until prompts_per_step groups can be trained on or the "
        "rounds are used up (dynamic sampling, DAPO, arXiv:2503.14476, section 3.2).",
    )
    num_generations: int = Field(8, ge=2, le=65536, description="Trajectories of one prompt: the members of a group.")
    fork: ForkConfig | None = Field(
        None,
        description="Write candidates at states of each group's members once these are written (VPRL, arXiv:2505.11409)"
        ". None: every trajectory begins at its prompt.",
    )
    image_credit: ImageCreditConfig | None = Field(
        None,
        description="Continue each thought from right after its pictures with others in their place, under the same "
        "noise, and credit a picture's segment with what its own was worth (a counterfactual baseline, as COMA's, "
        "arXiv:1705.08926). None: no such rollouts.",
    )
    restart: RestartConfig | None = Field(
        None,
        description="Begin a share of the groups from stored pictures of the latest steps (R3's buffered restarts, "
        "arXiv:2602.15772). None: every group begins at its prompt.",
    )
    num_iterations: int = Field(1, ge=1, description="Passes over one step's groups (mu in the GRPO paper).")
    num_minibatches: int = Field(1, ge=1, description="Optimiser steps a pass: the groups are divided among them.")
    tokens_per_micro_batch: int = Field(
        4096,
        ge=1,
        description="Slots of one forward pass: ids, with those of guidance branches and, where attention takes no "
        "rows end to end (eager, flash_attention_2), the padding to the longest row. A trajectory that takes more is "
        "divided at segments, though not below what its dearest segment takes with all that it sees; a pass that is "
        "over for that reason is named in the log. What fits a CPU's cache is quickest there.",
    )
    idle_limit: int | None = Field(
        None,
        ge=1,
        description="Steps in a row without an optimiser step, because no group could be trained on, after which the "
        "run is saved and stops with exit code 2; None: it warns and goes on.",
    )
    save_every: int = Field(10, ge=1, description="Steps between checkpoints; the last step is always saved.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    keep_rollouts: Annotated[int, Field(ge=1)] | Literal["none", "all"] = Field(
        "none",
        description="Steps that are kept whole, for `underdrawing replay`: every so many, beginning with the first; "
        "all; or none. Where save_every divides the number, the weights before a kept step are a checkpoint, for as "
        "long as keep_checkpoints leaves it there, and the whole step can be computed again. Not together with "
        "restart or image_credit.",
    )
    evaluate_every: int | None = Field(None, ge=1, description="Steps between held-out evaluations; None: never.")

    # Optimisation
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of matrices; biases and norms have none.")
    lr_scheduler_type: Schedule = Field(
        "constant_with_warmup", description="As in transformers' get_scheduler; TRL's default is linear."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimiser steps over which the learning rate rises from 0.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")

    # Loss
    loss_type: LossType = Field(
        "segment",
        description="How decisions are weighted in the loss. segment: mean within a "
        "segment, sum over the trajectory, mean over the batch. modality: mean within each "
        "modality of a trajectory, then the same. token: mean over all decisions of the batch. "
        "grpo, dr_grpo, dapo, bnpo: as in TRL (dapo is token).",
    )
    role_weights: Annotated[dict[str, float], WRITTEN] = Field(
        {}, description="Factor on the loss of a role's decisions; 1 if not named. 0 leaves the role out."
    )
    changed_weight: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Factor on the loss of a redrawn image's visual codes that differ from the policy's image before "
        "it; 1: none.",
    )
    max_completion_length: int = Field(512, ge=1, description="The constant that dr_grpo divides by; nothing is cut.")
    epsilon: float = Field(0.2, ge=0, description="Clip range.")
    epsilon_high: float | None = Field(None, ge=0, description="Upper clip range; None: the same as epsilon.")
    delta: float | None = Field(
        None,
        gt=1,
        description="Two-sided clipping: the largest ratio that an unclipped term may have. None: no such bound.",
    )
    clip_by_kind: dict[Kind, ClipConfig] = Field(
        {},
        description="Clip ranges of a kind of decision, in place of the three keys above; a number "
        "alone is its epsilon. Denoising steps (flow) that are not named have 1e-4, as in Flow-GRPO (its Fast form has "
        "1e-5), and 2e-6 with flow.ratio guard, as in GRPO-Guard.",
    )
    kind_weights: dict[Kind, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        {}, description="Factor on the loss of a kind of decision, after loss_type's weights; 1 if not named."
    )
    flow: FlowLossConfig = Field(
        default_factory=FlowLossConfig, description="Denoising steps, in families that denoise images."
    )
    beta: float = Field(0.0, ge=0, description="Weight of the KL divergence from the reference; 0: none is computed.")
    use_bias_correction_kl: bool = Field(
        True,
        description="Multiply the KL term by the ratio, which makes its gradient that of the reverse KL. Not that of "
        "denoising steps, which is exact.",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="Ratios by decision, or their geometric mean over the trajectory (GSPO)."
    )
    importance_sampling_cap: float | None = Field(
        3.0,
        gt=0,
        description="Where the trajectories were sampled by older "
        "weights, or by a writer whose log-probs are not the trainer's, a decision's loss is multiplied by the ratio "
        "to them, cut off here (TRL's vllm_importance_sampling_clip_max). None: no such factor.",
    )
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "token_truncate",
        description="Over what that ratio is taken, and what becomes of one over the cap (TRL's "
        "vllm_importance_sampling_mode): of a decision or of the whole trajectory; cut off, or 0.",
    )
    mask_truncated_completions: bool = Field(
        False, description="Leave trajectories that hit a limit out of the loss; they stay in the baseline."
    )

    # Credit
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="What advantages are divided by: the standard deviation of the group, of the batch, or 1."
    )
    advantage_level: Literal["trajectory", "segment", "reward_to_go"] = Field(
        "trajectory",
        description="trajectory: every segment has its trajectory's advantage. segment: the baseline of "
        "a segment is over the same role and occurrence in the group, and rewards by segment are added. reward_to_go: "
        "the sum of the normalised rewards that are given at the segment's end or later, those of other segments and "
        "the trajectory's own among them (UnifiedGRPO, arXiv:2603.09538).",
    )
    segment_reward_weights: dict[str, float] = Field(
        {},
        description="Weight of a reward part's values by segment, where advantage_level is segment or reward_to_go; 1 "
        "if not named.",
    )

    # Checks
    on_policy_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest |new - old log-prob| of the same weights. None: 1e-4 in float32, 0.1 in 16-bit types.",
    )
    sampling_tolerance: float = Field(
        0.1,
        gt=0,
        description="The same for a writer whose log-probs are not the trainer's (rollout.writer): the largest mean "
        "|trainer's - writer's log-prob| over a role's decisions.",
    )

    @property
    def credits_segments(self) -> bool:
        """Rewards by segment move advantages."""
        return self.advantage_level != "trajectory"

    @property
    def by_sequence(self) -> bool:
        """A ratio is over a whole trajectory, so all of its decisions are scored in one forward."""
        return self.importance_sampling_level == "sequence" or self.importance_sampling_mode.startswith("sequence")

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _as_in_trl(cls, value: Any) -> Any:
        return {True: "group", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> GrpoConfig:
        check_schedule(self.lr_scheduler_type, self.learning_rate)
        if self.num_minibatches > self.prompts_per_step:
            raise ValueError(
                f"num_minibatches is {self.num_minibatches}, but a step has only {self.prompts_per_step} "
                f"groups (prompts_per_step)"
            )
        if self.fork is not None and self.fork.members > self.num_generations:
            raise ValueError(
                f"fork.members is {self.fork.members}, but a group has only {self.num_generations} (num_generations)"
            )
        if self.keep_rollouts != "none" and (self.image_credit is not None or self.restart is not None):
            key = "image_credit" if self.image_credit is not None else "restart"
            raise ValueError(
                f"keep_rollouts: steps are kept of groups that begin at prompts and of candidates at states, and {key} "
                "rolls out more; take keep_rollouts: none"
            )
        if self.image_credit is not None:
            if self.image_credit.members is not None and self.image_credit.members > self.num_generations:
                raise ValueError(
                    f"image_credit.members is {self.image_credit.members}, but a group has only {self.num_generations} "
                    f"(num_generations)"
                )
            if "other" in self.image_credit.arms and self.prompts_per_step < 2:
                raise ValueError(
                    "image_credit.arms: a step of one prompt (prompts_per_step) has no other prompt's pictures; leave "
                    "'other' out"
                )
        if self.restart is not None and self.prompts_per_step < 2:
            raise ValueError(
                "restart: a step of one prompt (prompts_per_step) leaves no group to begin from a picture; give 2 or "
                "more"
            )
        negative = [role for role, weight in self.role_weights.items() if weight < 0]
        if negative:
            raise ValueError(f"role_weights.{negative[0]} is negative; 0 leaves a role out")
        if self.segment_reward_weights and not self.credits_segments:
            raise ValueError("segment_reward_weights needs advantage_level: segment or reward_to_go")
        return self
