"""What ``torch.mydev`` is: the functions that torch and its users expect of the module of a device."""

import torch


def is_available() -> bool:
    """Whether there is such a device: it is simulated, so always."""
    return True


def is_initialized() -> bool:
    """Whether the device can be used already."""
    return True


def device_count() -> int:
    """Number of devices."""
    return 1


def current_device() -> int:
    """Index of the device that new tensors go to."""
    return 0


def set_device(device: int | str | torch.device) -> None:
    """Choose the device that new tensors go to; there is but one."""


def get_device_name(device: int | str | torch.device | None = None) -> str:
    """Name of a device, for people."""
    return "simulated device"


def synchronize(device: int | str | torch.device | None = None) -> None:
    """Wait for the device; it never runs behind."""


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Dtypes that autocast may choose."""
    return [torch.float16, torch.bfloat16]


def manual_seed_all(seed: int) -> None:
    """Seed the generators of the devices: random numbers come from that of the CPU."""


def get_rng_state(device: int | str | torch.device | None = None) -> torch.Tensor:
    """State of the generator that random numbers come from."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: int | str | torch.device | None = None) -> None:
    """Set the state of that generator."""
    torch.set_rng_state(state)


def _is_in_bad_fork() -> bool:
    return False
