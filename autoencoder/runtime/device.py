"""What the machine is good at."""

import platform

import torch

from autoencoder.runtime.errors import ConfigError


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run on units of their own here."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def choose_precision(configured: str, device: torch.device, key: str) -> str:
    """`auto` as the device would have it: bf16 where it is fast, else fp32. ConfigError under `key` for fp16 on a CPU."""
    if configured == "fp16" and device.type == "cpu":
        raise ConfigError(key, configured, "fp16 needs a GPU; give auto, bf16 or fp32")
    if configured != "auto":
        return configured
    return "bf16" if fast_bf16(device) else "fp32"


def describe(device: torch.device, threads: int | None = None) -> str:
    """The device in words; of a CPU with the threads that are used, which are all unless they are given."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {threads or torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: the GPU's on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
