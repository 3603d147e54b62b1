"""The quantizer: it lets ``from_pretrained`` and ``save_pretrained`` of transformers handle a compressed model.

It is imported while transformers is still importing itself. So everything that needs models is imported on use.
"""

from importlib.metadata import version
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from taut.core.errors import TautError


@register_quantization_config("taut")
class TautConfig(QuantizationConfigMixin):
    """The entry in config.json: the plan (a list, because keys are sorted on writing) and where it came from."""

    def __init__(self, plan: list[dict[str, Any]], recipe: dict[str, Any], **origin: Any) -> None:
        self.quant_method = "taut"
        self.plan = plan
        self.recipe = recipe
        self.taut_version = origin.get("taut_version", version("taut"))
        self.family = origin.get("family", "")
        self.original = origin.get("original")
        if origin.get("healed"):
            self.healed = origin["healed"]
        # Folders of earlier versions call it "calibrated".
        tuned = origin.get("tuned") or origin.get("calibrated")
        if tuned:
            self.tuned = tuned


@register_quantizer("taut")
class TautQuantizer(HfQuantizer):
    """Installs the parts of a stored plan on the skeleton before the weights are loaded."""

    def __init__(self, quantization_config: TautConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise TautError("from_pretrained(quantization_config=...) does not compress a model: use taut.apply")
        self.surgery = None
        self._guarded = ()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from taut.surgery.install import Surgery, empty
        from taut.surgery.plan import restore_steps
        from taut.surgery.shape_guard import guard_skeleton, guarded_names

        steps = restore_steps(model, self.quantization_config.plan)
        self.surgery = Surgery(model, steps, empty, keep_originals=False)
        self._guarded = guarded_names(model, steps)
        guard_skeleton(model, self._guarded)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from taut.surgery.align import align_tensors
        from taut.surgery.dense_copies import install_dense_copies
        from taut.surgery.shape_guard import restore_shapes

        restore_shapes(model, self._guarded)
        align_tensors(model)
        allow_casting_and_training(model)
        tuned = self.quantization_config.to_dict().get("tuned")
        if tuned:
            install_dense_copies(model, self.surgery.steps, tuned)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict | None, dict[str, str]]:
        from taut.surgery.shape_guard import guard_state, guarded_names

        names = guarded_names(model, self.surgery.steps)
        # No metadata: safetensors writes two keys in no fixed order, and equal models must give equal files.
        return (guard_state(model.state_dict(), names) if names else None), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def allow_casting_and_training(model: Any) -> None:
    """Remove the flags that forbid casting and training: a compressed model allows both, like any other."""
    model.is_quantized = False
    for module in model.modules():
        if "config" in vars(module) and "_is_quantized" in vars(module.config):
            del module.config._is_quantized
