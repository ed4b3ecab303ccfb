"""What a recipe says of denoised images, held to the family that is to make them: a key that would be of no effect, and
denoising of which nothing could be trained, are named before the first step."""

from __future__ import annotations

from formats.base import Format
from rl.config import FlowLossConfig
from rollout.config import FlowConfig
from rollout.engine.flow import FlowPlan
from runtime.errors import UserError
from runtime.section import Section
from underdrawing.recipe import Recipe


def check_denoising(recipe: Recipe, denoises: bool | None, trained: Format | None = None) -> None:
    """Hold the keys about denoised images to the family.

    Args:
        denoises: whether the family denoises its images; None: that is not known before it is loaded.
        trained: the format whose thoughts are to be trained; None: they are only sampled, or none are.

    Raises:
        UserError: a key that is of no effect, a sampler that cannot be, or denoising without a step that could be
            trained.
    """
    if denoises is False:
        for key in _keys(recipe):
            raise UserError(
                f"{key}: the family '{recipe.policy.family}' denoises no images, so this would be of no effect; leave "
                "it out, or choose a family that denoises (policy.family)"
            )
    if denoises:
        for flow in (recipe.rollout.flow, recipe.evaluate.flow):
            if flow is not None:
                FlowPlan(flow)
        if trained is not None and trained.max_images and recipe.grpo.kind_weights.get("flow") != 0:
            _check_trained(recipe.rollout.flow)


def _keys(recipe: Recipe) -> list[str]:
    """The recipe's keys that speak of denoising and are not as a recipe without them has them."""
    found = _changed(recipe.rollout.flow, FlowConfig(), "rollout.flow")
    if recipe.evaluate.flow is not None:
        found.append("evaluate.flow")
    found += _changed(recipe.grpo.flow, FlowLossConfig(), "grpo.flow")
    found += [f"grpo.{name}.flow" for name in ("clip_by_kind", "kind_weights") if "flow" in getattr(recipe.grpo, name)]
    return found


def _changed(section: Section, default: Section, where: str) -> list[str]:
    names = type(default).model_fields
    return [f"{where}.{name}" for name in names if getattr(section, name) != getattr(default, name)]


def _check_trained(flow: FlowConfig) -> None:
    """Raises UserError where no step of any image is a decision."""
    plan = FlowPlan(flow)
    if plan.decides:
        return
    low, high = flow.window_range or (0, flow.steps)
    if flow.sampler == "ode":
        key, why, right = "sampler", "ode decides nothing", "choose sde, cps or dance"
    elif flow.steps == 1:
        key, why, right = "steps", "the last step is none to train, and there is no other", "give more steps"
    elif not plan.noisy_T.any():
        key, why = "noise_level", f"{flow.noise_level} gives no step of the sampler '{flow.sampler}' noise"
        right = "leave it out for the sampler's own"
    else:
        key = "window" if flow.window_range is None else "window_range"
        why, right = f"none of the steps {low} to {high - 1} gets noise", "lay it over steps that do"
    raise UserError(
        f"rollout.flow.{key}: {why}, so no image would be trained; {right}, or train words alone "
        "(grpo.kind_weights: {flow: 0})"
    )
