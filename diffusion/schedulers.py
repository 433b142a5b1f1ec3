"""Diffusers' schedulers: the one that a pipeline gets, the process that a pipeline's scheduler samples, and the stock solvers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before diffusers)
from autoencoder.runtime.errors import require
from diffusion.config import BLIND_DDIM, NO_DDIM, NO_SHIFT, ProcessConfig
from diffusion.process import BETAS, TIMESTEPS, Head, Process, flow, variance_preserving

import diffusers  # isort: skip
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler  # isort: skip

LEAST_LOG_SNR = -10.2
"""Variance-preserving samples begin no deeper in noise: -5.1 of DPM-Solver's half log SNR (Lu et al. 2022), as diffusers advises. Of the
tables the cosine alone goes deeper, to where noise that is predicted says nothing of the latents."""
PREDICTIONS: dict[Head, str] = {"velocity": "flow_prediction", "v": "v_prediction", "epsilon": "epsilon"}
"""Diffusers' names of the heads."""


def build_scheduler(config: ProcessConfig, time_shift: float = 1.0) -> DPMSolverMultistepScheduler:
    """A stock scheduler that samples the process: DPM-Solver++. `DiTPipeline` with Euler's or FlowMatch's is wrong or raises."""
    if config.name == "flow":
        return _dpm("velocity", use_flow_sigmas=True, flow_shift=time_shift)
    table: dict[str, Any] = {"beta_schedule": config.schedule}
    if config.schedule in BETAS:
        table["beta_start"], table["beta_end"] = BETAS[config.schedule]
    return _dpm(config.head, lambda_min_clipped=LEAST_LOG_SNR / 2, **table)


def integrate(
    solver: str, process: Process, output: Callable[[Tensor, float], Tensor], x: Tensor, *, steps: int, time_shift: float = 1.0
) -> Tensor:
    """x from noise to latents by diffusers' own `dpm++` (Lu et al. 2022b, second order, multistep) or `ddim` (Song et al. 2021).

    `output` is the network's at (x, t). Timesteps are the solver's: whole numbers.
    """
    scheduler = _solver(solver, process, time_shift)
    scheduler.set_timesteps(steps)
    if solver == "dpm++":
        # It finds its place by the timestep, and two may be one whole number.
        scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        x = scheduler.step(output(x, float(timestep) / TIMESTEPS), timestep, x, return_dict=False)[0]
    return x


def open_scheduler(folder: Path) -> Any:
    """The scheduler of a pipeline's folder; KeyError where diffusers has none of its name."""
    name = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    if not hasattr(diffusers, name):
        raise KeyError(name)
    return getattr(diffusers, name).from_pretrained(folder)


def read_process(scheduler: Any, path: str) -> tuple[Process, float]:
    """The process that a pipeline's scheduler samples, and its time shift.

    Raises:
        ConfigError: under `pipeline`, of `path`, for a scheduler that does more than sample flow matching or a table's process.
    """
    told, name = scheduler.config, type(scheduler).__name__
    heads = {prediction: head for head, prediction in PREDICTIONS.items()}
    prediction = told.get("prediction_type")

    def check(holds: bool, reason: str) -> None:
        use = "flow_prediction on flow sigmas, or v_prediction or epsilon by a table of betas"
        require(holds, "pipeline", path, f"its scheduler ({name}) {reason}; this samples {use}: use DiTPipeline itself for it")

    check(prediction in heads, f"predicts {prediction}")
    check(not (told.get("clip_sample") or told.get("thresholding")), "clips what it predicts")
    check(bool(told.get("use_flow_sigmas")) == (prediction == "flow_prediction"), f"predicts {prediction} on other noise levels")
    if prediction == "flow_prediction":
        steps = told.get("num_train_timesteps")
        check(steps == TIMESTEPS, f"counts {steps} timesteps, not {TIMESTEPS}")
        return flow(), float(told.get("flow_shift", 1.0))
    table = getattr(scheduler, "alphas_cumprod", None)
    check(isinstance(table, Tensor), "has no table of alphas")
    squares = torch.as_tensor(table).double().numpy()
    check(0 < squares.min() <= squares.max() < 1 and bool((squares[1:] < squares[:-1]).all()), "has a table that ends without signal")
    # Set by `rescale_betas_zero_snr` in place of 0.
    check(not told.get("rescale_betas_zero_snr"), "has a table that ends without signal")
    return variance_preserving(heads[prediction], squares), 1.0


def check_sampler(process: Process, sampler: str, time_shift: float) -> None:
    """Raise ConfigError under `sampler` or `time_shift` where a process cannot be sampled so."""
    is_flow = process.head == "velocity"
    require(is_flow or time_shift == 1, "time_shift", time_shift, NO_SHIFT)
    require(not (is_flow and sampler == "ddim"), "sampler", sampler, NO_DDIM)
    if sampler == "ddim" and process.head == "epsilon":
        last = torch.tensor(process.path.times[1], dtype=torch.float64)
        blind = float(process.path.log_snr(last)) < LEAST_LOG_SNR
        require(not blind, "sampler", sampler, BLIND_DDIM)


def _solver(name: str, process: Process, time_shift: float) -> Any:
    if process.head == "velocity":
        return _dpm("velocity", use_flow_sigmas=True, flow_shift=time_shift)
    grid = torch.arange(round(process.path.times[1] * TIMESTEPS) + 1, dtype=torch.float64) / TIMESTEPS
    squares = process.path.scales(grid)[0].square()
    betas = 1 - squares / torch.cat([torch.ones_like(squares[:1]), squares[:-1]])
    table = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}
    if name == "ddim":
        return DDIMScheduler(**table, prediction_type=PREDICTIONS[process.head], clip_sample=False, timestep_spacing="trailing")
    return _dpm(process.head, lambda_min_clipped=LEAST_LOG_SNR / 2, **table)


def _dpm(head: Head, **settings: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type=PREDICTIONS[head], solver_order=2, final_sigmas_type="zero", **settings)
