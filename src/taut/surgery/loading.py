"""Turns a MODEL argument into a folder, a config, a model and a tokenizer."""

import json
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from taut.architectures.skeleton import model_class, skeleton
from taut.core.errors import TautError, nearest
from taut.core.safetensors_header import read_header
from taut.surgery.folders import check_folder, local_folder

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The names of float dtypes in safetensors."""
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*/config.json", "*.tiktoken")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a ``folder`` with weights, or ``scratch``, a config for random weights."""

    name: str
    folder: Path | None = None
    scratch: PreTrainedConfig | None = None

    @property
    def config(self) -> PreTrainedConfig:
        if self.scratch is not None:
            return self.scratch
        try:
            return AutoConfig.from_pretrained(self.folder)
        except (ValueError, OSError, KeyError) as error:
            raise TautError(f"{self.folder}/config.json: {_one_line(error)}") from None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: the configuration's, else the first float tensor's of the folder, else float32."""
        configured = self.config.dtype
        if isinstance(configured, torch.dtype):
            return configured
        headers = map(read_header, sorted(self.folder.glob("*.safetensors")) if self.folder else ())
        names = (tensor["dtype"] for header in headers for tensor in header.tensors.values())
        return next((FLOATS[name] for name in names if name in FLOATS), torch.float32)


def resolve(name: str | Path) -> Source:
    """Find the source of a model by its name.

    ``name`` is a folder, a name in the folder that the variable TAUT_MODELS gives, a Hub id, ``minilm`` (packaged), or
    a scratch spec such as ``llama:hidden_size=256``. Raises TautError for a folder without config, with pickles instead
    of safetensors or with truncated weights, a Hub id that cannot be reached, and an unknown architecture or config
    key.
    """
    text, folder = str(name), local_folder(name)
    if folder is not None:
        return Source(text, folder)
    return Source(text, scratch=_scratch(text)) if "/" not in text else Source(text, check_folder(_download(text)))


def check_device(device: str | torch.device, kinds: tuple[str, ...] = ()) -> torch.device:
    """Return the device of this name.

    Raises TautError, which names the devices to choose from, if it is not on this machine. With ``kinds``, an
    accelerator must be one of these.
    """
    available, accelerator = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and (not kinds or accelerator.type in kinds):
        available += [
            accelerator.type,
            *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())),
        ]
    # torch.device() also accepts devices that this machine lacks.
    if str(device) not in available:
        raise TautError(f"device = {str(device)!r}: not on this machine; expected {' or '.join(available)}")
    return torch.device(device)


def open_model(source: Source, dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """Open the model in evaluation mode. ``dtype`` None keeps the checkpoint's own. ``seed`` is for random weights.

    The device ``disk`` leaves the weights of a folder on disk. Each module reads its own when it is called, and
    computes on the CPU. Raises TautError for missing, unexpected or mismatched keys, and for a device that is not on
    this machine.
    """
    if device != "disk":
        device = str(check_device(device))
    config = source.config
    if source.folder is None:
        device = "cpu" if device == "disk" else device
        torch.manual_seed(seed)
        return model_class(config)._from_config(config, dtype=dtype or source.dtype).to(device).eval()
    # Used only for weights that cannot stay as they are, such as those of another dtype.
    converted = tempfile.TemporaryDirectory(prefix="taut-") if device == "disk" else None
    try:
        model, report = model_class(config).from_pretrained(
            source.folder,
            config=config,
            dtype=dtype or source.dtype,
            output_loading_info=True,
            device_map=device_map(device),
            offload_folder=converted and converted.name,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise TautError(f"{source.folder}: {_one_line(error)}") from None
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        keys = sorted(str(key) for key in report.get(kind) or ())
        if keys:
            raise TautError(f"{source.folder}: {len(keys)} {kind.replace('_', ' ')}, first {keys[0]!r}")
    if converted is not None:
        weakref.finalize(model, converted.cleanup)
    return model.eval()


def device_map(device: str) -> str | dict[str, str] | None:
    """The ``device_map`` of from_pretrained for a device: None for the CPU, so that accelerate adds no hooks."""
    if device == "cpu":
        return None
    return {"": "disk"} if device == "disk" else device


def open_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """Open the tokenizer of the folder; None if there is none (scratch models). Raises TautError if it is broken."""
    names = [] if source.folder is None else [path.name for path in source.folder.iterdir()]
    if not any(name.startswith(("tokenizer", "vocab")) for name in names):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source.folder)
    except (ValueError, OSError) as error:
        raise TautError(f"{source.folder}: tokenizer: {_one_line(error)}") from None


def open_skeleton(source: Source, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model without its weights, on the meta device. ``dtype`` None is the checkpoint's own."""
    return skeleton(source.config, dtype or source.dtype)


def _scratch(text: str) -> PreTrainedConfig:
    family, _, fields = text.partition(":")
    families = transformers.CONFIG_MAPPING.keys()
    if family not in families:
        raise TautError(f"{text}: unknown architecture {family!r}: {_nearest_few(family, families)}")
    default = AutoConfig.for_model(family)
    values: dict[str, Any] = {}
    for field in filter(None, fields.split(",")):
        key, equals, value = field.partition("=")
        if not equals or key not in default.to_dict():
            raise TautError(f"{text}: {family} has no config field {key!r}: {_nearest_few(key, default.to_dict())}")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    config = AutoConfig.for_model(family, **values)
    for task in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM, transformers.AutoModel):
        if type(config) in task._model_mapping:
            config.architectures = [task._model_mapping[type(config)].__name__]
            return config
    return config


def _nearest_few(word: str, choices: Any) -> str:
    message = nearest(word, choices)
    return message if len(message) < 200 else message.partition("(choices")[0].strip() or "see transformers' docs"


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from tqdm.auto import tqdm

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), tqdm_class=tqdm))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise TautError(
            f"{name}: no such folder here, and the Hub cannot be reached or has no such model: {_one_line(error)}"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
