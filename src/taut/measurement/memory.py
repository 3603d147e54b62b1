"""Measures peak memory: of a block of code, and of loading and running a saved model in a fresh process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from taut.core.record import Quantity
from taut.measurement import sandbox
from taut.measurement.clock import synchronize


class Peak:
    """``before``: bytes in use at the start of a block; ``most``: the most in use within it. None: not readable."""

    def __init__(self, before: int | None) -> None:
        self.before = before
        self.most: int | None = None

    @property
    def extra(self) -> int | None:
        """The bytes that the block needed in addition to ``before``."""
        return None if self.before is None or self.most is None else max(0, self.most - self.before)


@contextmanager
def watch(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measure the memory of a block: on cuda the allocator's, on the CPU the resident memory of this process.

    The CPU's peak can only be reset on Linux; elsewhere ``extra`` is None. Memory that was freed but not returned to
    the system counts as in use before: for reliable numbers, run in a fresh process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak = Peak(torch.cuda.memory_allocated(device))
        yield peak
        synchronize(device)
        peak.most = torch.cuda.max_memory_allocated(device)
        return
    try:
        # Writing 5 resets the peak to the memory in use now: proc(5).
        Path("/proc/self/clear_refs").write_text("5")
        peak = Peak(sandbox.peak_bytes())
    except OSError:
        peak = Peak(None)
    yield peak
    peak.most = sandbox.peak_bytes()


def peak_memory(
    folder: str | Path,
    *,
    batch: int = 1,
    length: int = 128,
    device: str = "cpu",
    threads: int = 1,
    dtype: str | None = None,
    timeout: float | None = None,
) -> dict[str, Quantity]:
    """Load a saved model in a fresh process and run one forward pass over (batch, length) random ids.

    ``peak``: the most memory beyond the bare process with its libraries, loading included. ``forward``: the memory of
    the pass beyond the loaded model. Raises what ``sandbox.call`` raises.
    """
    arguments = {"folder": str(folder), "batch": batch, "length": length, "device": device, "threads": threads}
    figures = sandbox.call("taut.measurement.memory:load_and_run", arguments | {"dtype": dtype}, timeout).result
    how = f"fresh process, {batch} x {length} tokens, {threads} thread{'s' if threads > 1 else ''}, {device}"
    return {name: Quantity(value=figures[name], unit="bytes", how=how) for name in ("peak", "forward")}


def load_and_run(folder: str, batch: int, length: int, device: str, threads: int, dtype: str | None) -> dict[str, Any]:
    """Do the work of ``peak_memory``; call it in a separate process."""
    import transformers

    torch.set_num_threads(threads)
    config = transformers.AutoConfig.from_pretrained(folder)
    # Looking up the class imports its module, which must not count as the model's memory.
    loader = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    with watch(device) as whole:
        model = loader.from_pretrained(folder, dtype=dtype or "auto").to(device).eval()
        ids = torch.randint(5, config.get_text_config().vocab_size, (batch, length), device=device)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
        # The weights are pages of a mapped file, loaded only when they are read; unused rows would not be counted.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.max()
        loading = sandbox.peak_bytes() if device == "cpu" else torch.cuda.max_memory_allocated()
        with watch(device) as forward, torch.no_grad():
            model(**inputs)
    highest = max(loading, forward.most)
    return {"peak": None if whole.before is None else highest - whole.before, "forward": forward.extra}
