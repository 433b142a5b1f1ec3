"""What to do at each alarm: what the configuration of the run has not tried yet. Torch-free."""

from collections.abc import Callable

from autoencoder.objective_config import KLConfig, ObjectiveConfig


def remedy(name: str, objective: ObjectiveConfig, *, encoder_steps: bool = False) -> str:
    """What to do at the alarm `name` in a run with this objective, and with steps of the encoder alone or without."""
    if name == "collapse":
        ahead = "" if encoder_steps else "; or train the encoder ahead of the decoder (experimental.encoder_steps)"
        return _against_collapse(objective.kl) + ahead
    return REMEDIES[name](objective)


def _against_collapse(kl: KLConfig) -> str:
    if kl.control == "target":
        return (
            f"objective.kl.control=target lowers the weight while the KL is below {kl.target:g} nats. Let it start lower "
            "(objective.kl.weight), and reach further down where it stands at its bound (objective.kl.bounds)"
        )
    if kl.control == "geco":
        return (
            f"objective.kl.control=geco moves the weight until the RMS error is {kl.target_rmse:g}: give a smaller "
            "objective.kl.target_rmse, which takes latents to reach, or let the weight start lower (objective.kl.weight)"
        )
    slowly = {
        "constant": ", or raise it slowly (objective.kl.schedule=linear)",
        "cyclical": "",
    }.get(kl.schedule, ", or raise it more slowly (objective.kl.anneal_images)")
    return f"Lower objective.kl.weight{slowly}; {_floor(kl)} or hold a rate (objective.kl.control=target)"


def _against_dominating_kl(objective: ObjectiveConfig) -> str:
    return (
        "Expect blur. "
        + {
            "none": "Lower objective.kl.weight towards an effective beta of 1, or hold a higher rate (objective.kl.control=target)",
            "target": "objective.kl.control=target holds so low a rate at this price: give a higher objective.kl.target",
            "geco": "objective.kl.control=geco charges what its error allows: give a smaller objective.kl.target_rmse",
        }[objective.kl.control]
    )


def _against_idle_channels(objective: ObjectiveConfig) -> str:
    kl = objective.kl
    if kl.control != "none":
        more = "a higher objective.kl.target" if kl.control == "target" else "a smaller objective.kl.target_rmse"
        use = f"give {more}, or {_floor(kl)}"
    elif kl.schedule == "constant":
        use = f"raise the weight of the KL slowly (objective.kl.schedule=linear), lower it, or {_floor(kl)}"
    else:
        use = f"lower objective.kl.weight, or {_floor(kl)}"
    return (
        f"To use them, {use}. Where the quality is enough as it is, give fewer model.latent_channels: idle ones are noise to a "
        "diffusion model"
    )


def _floor(kl: KLConfig) -> str:
    if kl.free_bits == 0:
        return "give each channel a floor (objective.kl.free_bits)"
    return f"raise the floor of each {kl.free_bits_per} (objective.kl.free_bits)"


def _against_scale_at_bound(objective: ObjectiveConfig) -> str:
    if objective.likelihood.name.startswith("discretized"):
        return "Give wider objective.likelihood.bounds"
    return (
        "Take a discretised likelihood (objective.likelihood.name=discretized_logistic), whose values cannot be worth more than certainty; "
        "or wider objective.likelihood.bounds"
    )


def _against_logvar_at_clamp(objective: ObjectiveConfig) -> str:
    price = {
        "none": "Raise objective.kl.weight",
        "target": "Lower objective.kl.target, and with it raise the weight of the KL",
        "geco": "Give a larger objective.kl.target_rmse, and with it raise the weight of the KL",
    }[objective.kl.control]
    return f"{price}, which is what keeps variances from vanishing, or lower optimizer.lr; such latents are not to be compared by their KL"


def _against_target_missed(objective: ObjectiveConfig) -> str:
    key = "target" if objective.kl.control == "target" else "target_rmse"
    return (
        f"Where the weight stands at a bound, give wider objective.kl.bounds or an objective.kl.{key} that this network can reach; where "
        "it is still on its way, train longer or start nearer to where it ended (objective.kl.weight); where it swings, give a longer "
        "objective.kl.response_images"
    )


def _against_won_discriminator(objective: ObjectiveConfig) -> str:
    adversarial = objective.adversarial
    held = adversarial.gate[1] < 1
    gate = "It stands still already (objective.adversarial.gate). " if held else "Hold it (objective.adversarial.gate=0.55,0.85). "
    penalty = "raise its penalty" if adversarial.r1 > 0 else "penalise its gradient"
    return (
        f"{gate}Lower objective.adversarial.lr or width, {penalty} (objective.adversarial.r1), or start later "
        "(objective.adversarial.start), from reconstructions that are harder to tell"
    )


REMEDIES: dict[str, Callable[[ObjectiveConfig], str]] = {
    "dominating_kl": _against_dominating_kl,
    "idle_channels": _against_idle_channels,
    "scale_at_bound": _against_scale_at_bound,
    "logvar_at_clamp": _against_logvar_at_clamp,
    "target_missed": _against_target_missed,
    "discriminator_won": _against_won_discriminator,
}
"""By alarm, all but `collapse`."""
