"""Find the slots of a model whose family has no row in families.py, or report exactly what was not found."""

import inspect
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from taut.architectures.families import BIAS, POSITIONS, TOKEN_TYPES, Family, Stack
from taut.core.errors import TautError

# The usual names of each map, as the end of its path.
PROJECTION = {
    "q": ("q_proj", "query", "q", "q_lin", "query_proj", "wq"),
    "k": ("k_proj", "key", "k", "k_lin", "key_proj", "wk"),
    "v": ("v_proj", "value", "v", "v_lin", "value_proj", "wv"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"),
    "o": ("o_proj", "out_proj", "o", "out_lin", "dense", "c_proj", "Wo", "wo"),
}
FEEDFORWARD = {
    "gate": ("gate_proj", "wi_0", "w1"),
    "up": ("up_proj", "fc1", "dense_h_to_4h", "c_fc", "lin1", "wi", "wi_1", "w3", "intermediate.dense", "fc_in"),
    "gate_up": ("gate_up_proj", "Wi"),
    "down": ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "lin2", "wo", "Wo", "w2", "output.dense", "fc_out"),
}
CROSS = ("cross", "encoder_attn", "encdec")
LONGEST = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")


def probe(model: PreTrainedModel) -> Family:
    """Make a family row for a model of unknown type, from the names and shapes of its modules.

    Raises TautError naming what was not found. If the model uses its own attention function, or it is unclear how
    positions are encoded or whether attention is causal, the attention and memory slots are closed, with the reason.
    """
    return _Probe(model).run()


class _Probe:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.base = model, model.base_model
        self.config = model.config.get_text_config()

    def run(self) -> Family:
        table = self._table()
        tables = [name for name, module in self.base.named_modules() if isinstance(module, nn.Embedding)]
        biases = [name for name in tables if "bias" in name]
        positions = [name for name in tables if ("position" in name or name.endswith("wpe")) and name not in biases]
        types = [name for name in tables if "token_type" in name]
        reasons = dict.fromkeys(positions, POSITIONS)
        reasons |= dict.fromkeys(biases, BIAS) | dict.fromkeys(types, TOKEN_TYPES)
        stacks = tuple(self._stack(path, positions, bool(biases)) for path in self._lists())
        longest = next((name for name in LONGEST if getattr(self.config, name, None)), "")
        return Family(tables=(table,), stacks=stacks, untouched=reasons, longest=longest)

    def _refuse(self, what: str) -> TautError:
        kind = self.config.model_type
        return TautError(f"model type {kind!r} has no row in architectures/families.py, and its modules show no {what}")

    def _table(self) -> str:
        try:
            table = self.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            table = None
        for name, module in self.base.named_modules():
            if module is table and isinstance(module, nn.Embedding):
                return name
        raise self._refuse("token table (get_input_embeddings() gives no Embedding)")

    def _lists(self) -> list[str]:
        """Return the path of the longest list of layers with attention; for encoder-decoders one path for each half."""
        matches = {
            name: len(module)
            for name, module in self.base.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and _attentions(module[0])
        }
        # A list inside a layer (T5) belongs to that layer.
        outer = [name for name in matches if not any(name.startswith(f"{other}.") for other in matches)]
        if not outer:
            raise self._refuse("list of layers with query, key and value maps")
        if self.config.is_encoder_decoder:
            parts = [name for start in ("encoder", "decoder") for name in outer if name.split(".")[0] == start]
            if len(parts) != 2:
                raise self._refuse(f"one encoder and one decoder among its lists of layers ({', '.join(outer)})")
            return parts
        longest = max(outer, key=matches.__getitem__)
        expected = (self.config.num_hidden_layers, getattr(self.config, "decoder_layers", None))
        if matches[longest] not in expected:
            raise self._refuse(f"list of {expected[0]} layers with attention ({longest} has {matches[longest]})")
        return [longest]

    def _stack(self, path: str, tables: list[str], biased: bool) -> Stack:
        layer = self.base.get_submodule(path)[0]
        attentions = _attentions(layer)
        self_attentions = [name for name in attentions if not _is_cross(name)]
        cross = [name for name in attentions if _is_cross(name)]
        if len(self_attentions) != 1 or len(cross) > 1:
            raise self._refuse(f"single self-attention in a layer of {path} (found {', '.join(attentions)})")
        half = path.split(".")[0]
        name = half if self.config.is_encoder_decoder else ""
        heads = f"{half}_attention_heads"
        heads = heads if heads in vars(self.config) else "num_attention_heads"
        projection = self._projection(layer, self_attentions[0], path)
        self._check_heads(layer, projection, getattr(self.config, heads), f"{path}.0.{self_attentions[0]}")
        crossing = self._projection(layer, cross[0], path) if cross else {}
        attention, position = layer.get_submodule(self_attentions[0]), self._position(bool(tables), biased)
        return Stack(
            layers=path,
            attention=self_attentions[0],
            projection=projection,
            feedforward=(self._feedforward(layer, (*attentions, *projection.values(), *crossing.values()), path),),
            position=position or "none",
            positions=self._positions(position, tables, name),
            name=name,
            base=name,
            heads=heads,
            cross_attention=cross[0] if cross else "",
            cross={f"cross_{role}": inner for role, inner in crossing.items()},
            closed=self._closed(attention, position),
        )

    def _closed(self, attention: nn.Module, position: str | None) -> str:
        """Return why the attention function of these layers cannot be replaced safely, or an empty string if it can."""
        if not type(self.base)._can_set_attn_implementation():
            return "attention and memory: the model calls an attention function of its own"
        if self.config is not self.model.config:
            return "attention and memory: the parts of this model (text, vision) share one attention setting"
        if list(attention.parameters(recurse=False)):
            return "attention and memory: the attention module has parameters of its own"
        if position is None:
            return "attention and memory: it is unknown how positions are encoded (no rotary module, table or bias)"
        if not isinstance(vars(attention).get("is_causal"), bool):
            return "attention and memory: it is unknown whether attention is causal (no is_causal)"
        return ""

    def _position(self, learned: bool, biased: bool) -> str | None:
        if getattr(self.config, "alibi", False):
            return None
        if any("rotary" in name for name, _ in self.base.named_modules()):
            return "rope"
        return "bias" if biased else "learned" if learned else None

    def _positions(self, position: str | None, tables: list[str], half: str) -> tuple[str, ...]:
        """Return the modules that encode positions in a stack, except rotary ones that rotate queries themselves."""
        rotary = [
            name
            for name, module in self.base.named_modules()
            if "rotary" in name and "position_ids" in inspect.signature(module.forward).parameters
        ]
        matches = {"rope": rotary, "learned": tables}.get(position, [])
        return tuple(name for name in matches if not half or name.split(".")[0] == half)

    def _projection(self, layer: nn.Module, attention: str, path: str) -> dict[str, str]:
        """Return each role's map as a path in the layer. The output map may be outside the attention module (BERT)."""
        maps = _maps(layer.get_submodule(attention), attention, deep=False)
        matches = _roles(maps, PROJECTION)
        if "o" not in matches:
            parent = attention.rpartition(".")[0]
            beside = f"{parent}.output.dense".lstrip(".")
            if beside not in _maps(layer, "", deep=True):
                raise self._refuse(f"output map of the attention {path}.0.{attention} (it has {', '.join(maps)})")
            matches["o"] = beside
        return matches

    def _check_heads(self, layer: nn.Module, projection: Mapping[str, str], heads: int, where: str) -> None:
        shapes = {role: _shape(layer.get_submodule(name)) for role, name in projection.items()}
        inner = shapes["o"][1]
        if inner % heads or ("q" in shapes and shapes["q"][0] != inner):
            seen = ", ".join(f"{role} {outputs} x {inputs}" for role, (outputs, inputs) in shapes.items())
            raise self._refuse(f"attention of {heads} equal heads at {where} ({seen})")

    def _feedforward(self, layer: nn.Module, taken: tuple[str, ...], path: str) -> dict[str, str]:
        inside = tuple(f"{name}." for name in taken)
        maps = _maps(layer, "", deep=True)
        free = {name: maps[name] for name in maps if name not in taken and not name.startswith(inside)}
        matches = _roles(free, FEEDFORWARD)
        first = matches.get("up") or matches.get("gate_up")
        if not first or "down" not in matches:
            seen = ", ".join(free) or "none"
            raise self._refuse(f"pair of feed-forward maps in a layer of {path} (maps beside attention: {seen})")
        (hidden, width), (back, inward) = _shape(free[first]), _shape(free[matches["down"]])
        hidden //= 2 if "gate_up" in matches else 1
        if (hidden, width) != (inward, back):
            raise self._refuse(
                f"matching feed-forward maps in a layer of {path} ({first} and {matches['down']} differ)"
            )
        return matches


def _attentions(layer: nn.Module) -> list[str]:
    """List the paths, within a layer, of modules with query, key and value maps as children."""
    matches = []
    for name, module in layer.named_modules():
        roles = _roles(_maps(module, name, deep=False), PROJECTION)
        if name and ("qkv" in roles or {"q", "k", "v"} <= roles.keys()):
            matches.append(name)
    return matches


def _is_cross(name: str) -> bool:
    return any(word in name.lower() for word in CROSS)


def _maps(module: nn.Module, path: str, deep: bool) -> dict[str, nn.Module]:
    """Return linear maps by their path: the children of a module or, if ``deep``, all its descendants."""
    matches = module.named_modules() if deep else module.named_children()
    return {
        ".".join(part for part in (path, name) if part): child
        for name, child in matches
        if isinstance(child, nn.Linear | Conv1D)
    }


def _roles(maps: Mapping[str, nn.Module], names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return, for each role, the path of the first map that ends in one of the role's names."""
    matches: dict[str, str] = {}
    for role, endings in names.items():
        for path in maps:
            if any(path == ending or path.endswith(f".{ending}") for ending in endings):
                matches.setdefault(role, path)
    return matches


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a map."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
