"""Find the sites of an original model: every place where a part can be replaced, and what stays unchanged and why."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from taut.architectures.detect import probe
from taut.architectures.families import FAMILIES, Family, Stack
from taut.core.cost import BYTES_OF_DTYPE
from taut.core.errors import TautError, nearest
from taut.core.site import AttentionSite, LinearSite, MemorySite, Site, TableSite

UNLIMITED_LENGTH = 512
LONGEST_DEFAULT = 2048
FUSED = {"qkv": 3, "gate_up": 2}
"""How many maps of equal size are fused into one. If there are fewer keys than queries, qkv counts as a single map."""


@dataclass(frozen=True)
class Anatomy:
    """The result of locate.

    ``sites`` are in model order. ``untouched`` pairs a path (``*`` for any layer) with the reason. ``blocks`` has the
    paths of the layers of each stack (``""``, or ``encoder`` and ``decoder``).
    """

    family: str
    sites: tuple[Site, ...]
    untouched: tuple[tuple[str, str], ...]
    blocks: Mapping[str, tuple[str, ...]]

    @property
    def layers(self) -> Mapping[str, int]:
        """The number of layers of each stack."""
        return {stack: len(paths) for stack, paths in self.blocks.items()}

    def site(self, name: str) -> Site:
        """Return the site with this stable name. Raises TautError, naming the nearest one, if there is none."""
        by_name = {site.name: site for site in self.sites}
        if name not in by_name:
            raise TautError(f"no site {name!r} in this {self.family} model: {nearest(name, by_name)}")
        return by_name[name]

    def in_slot(self, slot: str) -> tuple[Site, ...]:
        """Return the sites of one slot, in model order."""
        return tuple(site for site in self.sites if site.slot == slot)


def locate(model: PreTrainedModel, length: int | None = None) -> Anatomy:
    """Find the sites of ``model``, with any head. No tensor value is read, so a model on the meta device works.

    ``length``: the number of positions n for which costs are stated. The default is the model's own limit, but at most
    2048, and 512 if it has none. ``model`` must be an original, without replaced parts. Raises TautError for a family
    that is neither known nor can be probed, naming what was not found, and for a length the model does not support.
    """
    listed = FAMILIES.get(model.config.model_type)
    family = listed or probe(model)
    name = model.config.model_type if listed else f"probed:{model.config.model_type}"
    return _Search(model, family, name, length).run()


class _Search:
    """One run of locate. Paths of families start at the base model; ``_path`` turns them into paths of ``model``."""

    def __init__(self, model: PreTrainedModel, family: Family, name: str, length: int | None) -> None:
        self.model, self.family, self.name, self.config = model, family, name, model.config.get_text_config()
        self.base = model.base_model
        self.prefix = "" if self.base is model else model.base_model_prefix
        self.length = self._length(length)

    def run(self) -> Anatomy:
        present = [stack for stack in self.family.stacks if self._exists(stack.layers)]
        if not present:
            choices = " or ".join(f"{stack.layers!r}" for stack in self.family.stacks)
            raise TautError(f"{type(self.model).__name__}: no layers at {choices}; pass the whole {self.name} model")
        sites: list[Site] = [self._table()]
        remarks: list[tuple[str, str]] = []
        memory: list[Site] = []
        blocks: dict[str, tuple[str, ...]] = {}
        for stack in present:
            count = len(self._module(stack.layers))
            blocks[stack.name] = tuple(self._path(f"{stack.layers}.{layer}") for layer in range(count))
            inside = [list(self._layer(stack, layer)) for layer in range(count)]
            sites += [site for layer_sites in inside for site in layer_sites]
            if stack.closed:
                remarks.append((self._path(f"{stack.layers}.*.{stack.attention}"), stack.closed))
            else:
                memory += self._memory(stack, inside)
            if any(site.role.startswith("cross_") for layer_sites in inside for site in layer_sites):
                path = self._path(f"{stack.layers}.*.{stack.cross_attention}")
                remarks.append(
                    (path, "cross-attention: its maps can be replaced, its attention function and cache cannot")
                )
        sites += memory
        return Anatomy(self.name, tuple(sites), (*remarks, *self._leftovers(sites)), blocks)

    # Names -----------------------------------------------------------------------------------------------------------

    def _path(self, relative: str) -> str:
        return ".".join(part for part in (self.prefix, relative) if part)

    def _module(self, relative: str) -> nn.Module:
        return self.model.get_submodule(self._path(relative))

    def _exists(self, relative: str) -> bool:
        try:
            self._module(relative)
        except AttributeError:
            return False
        return True

    def _dtype(self, module: nn.Module, path: str) -> str:
        dtype = str(module.weight.dtype).removeprefix("torch.")
        if not module.weight.dtype.is_floating_point or dtype not in BYTES_OF_DTYPE:
            raise TautError(f"{path}: weights of dtype {dtype}; expected float64, float32, float16 or bfloat16")
        return dtype

    def _length(self, length: int | None) -> int:
        limit = None
        if self.family.longest:
            limit = getattr(self.config, self.family.longest, None)
            limit = limit and limit - self.family.reserved
        if length is None:
            return min(limit, LONGEST_DEFAULT) if limit else UNLIMITED_LENGTH
        if length < 1:
            raise TautError(f"length = {length}: expected at least 1 position")
        if limit and length > limit and any(stack.position == "learned" for stack in self.family.stacks):
            raise TautError(f"length = {length}: this {self.name} model has only {limit} learned positions")
        return length

    # Sites -----------------------------------------------------------------------------------------------------------

    def _table(self) -> TableSite:
        relative = next((place for place in self.family.tables if self._exists(place)), None)
        if relative is None:
            choices = " or ".join(f"{place!r}" for place in self.family.tables)
            raise TautError(f"{type(self.model).__name__}: no token table at {choices}")
        path, table = self._path(relative), self._module(relative)
        tied = [(name, self.model.get_submodule(name)) for name in self._tied_to(path)]
        return TableSite(
            slot="embedding",
            path=path,
            dtype=self._dtype(table, path),
            rows=table.num_embeddings,
            width=table.embedding_dim,
            scale=_scale(table, self.config.hidden_size),
            padding_row=table.padding_idx,
            copies=tuple(name for name, module in tied if isinstance(module, nn.Embedding)),
            heads=tuple(name for name, module in tied if not isinstance(module, nn.Embedding)),
        )

    def _tied_to(self, path: str) -> list[str]:
        """List the modules tied to the table: they share its parameter or, on meta, the model declares them as tied."""
        weight, key = self.model.get_submodule(path).weight, f"{path}.weight"
        declared = self.model.all_tied_weights_keys if weight.is_meta else {}
        source = declared.get(key, key)
        return [
            name.rpartition(".")[0]
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if name != key and (parameter is weight or declared.get(name, name) == source)
        ]

    def _layer(self, stack: Stack, layer: int) -> Iterator[Site]:
        where = f"{stack.layers}.{layer}"
        maps = {role: self._linear("projection", stack, layer, role, path) for role, path in stack.projection.items()}
        if "qkv" in maps and maps["qkv"].outputs != 3 * maps["o"].inputs:
            maps["qkv"] = replace(maps["qkv"], fused=1)
        yield from maps.values()
        if not stack.closed:
            yield self._attention(stack, layer, maps)
        if stack.cross and self._exists(f"{where}.{stack.cross_attention}"):
            for role, path in stack.cross.items():
                yield self._linear("projection", stack, layer, role, path)
        for variant in stack.feedforward:
            if all(self._exists(f"{where}.{path}") for path in variant.values()):
                for role, path in variant.items():
                    yield self._linear("feedforward", stack, layer, role, path)
                return
        wanted = " or ".join(", ".join(variant.values()) for variant in stack.feedforward)
        raise TautError(f"{self.name}: no feed-forward maps in {self._path(where)}: looked for {wanted}")

    def _linear(self, slot: str, stack: Stack, layer: int, role: str, inner: str) -> LinearSite:
        path = self._path(f"{stack.layers}.{layer}.{inner}")
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            raise TautError(f"{self.name}: no {role} map at {path}") from None
        if not isinstance(module, nn.Linear | Conv1D):
            raise TautError(f"{path}: expected a Linear or Conv1D, not {type(module).__name__}")
        transposed = isinstance(module, Conv1D)
        outputs, inputs = reversed(module.weight.shape) if transposed else module.weight.shape
        return LinearSite(
            slot=slot,
            path=path,
            dtype=self._dtype(module, path),
            layer=layer,
            stack=stack.name,
            role=role,
            inputs=inputs,
            outputs=outputs,
            bias=module.bias is not None,
            transposed=transposed,
            fused=FUSED.get(role, 1),
        )

    def _attention(self, stack: Stack, layer: int, maps: Mapping[str, LinearSite]) -> AttentionSite:
        path = f"{stack.layers}.{layer}.{stack.attention}"
        heads = getattr(self.config, stack.heads)
        head_width = maps["o"].inputs // heads
        fused = "qkv" in maps
        key_heads = (maps["qkv"].outputs // head_width - heads) // 2 if fused else maps["k"].outputs // head_width
        return AttentionSite(
            slot="attention",
            path=self._path(path),
            dtype=maps["o"].dtype,
            layer=layer,
            stack=stack.name,
            heads=heads,
            key_heads=key_heads,
            head_width=head_width,
            causal=bool(vars(self._module(path)).get("is_causal", stack.causal)),
            position=stack.position,
            length=self.length,
            window=_window(self.config, layer),
            softcap=getattr(self.config, "attn_logit_softcapping", None),
            positions=tuple(self._path(position) for position in stack.positions),
        )

    def _memory(self, stack: Stack, inside: list[list[Site]]) -> Iterator[MemorySite]:
        """Yield the cache of a causal stack as one site. Raises TautError if keys differ in shape between layers."""
        layers = [site for layer_sites in inside for site in layer_sites if isinstance(site, AttentionSite)]
        if not layers or not all(site.causal for site in layers):
            return
        shapes = {(site.key_heads, site.head_width) for site in layers}
        if len(shapes) > 1:
            raise TautError(f"{self.name}: layers with keys of different shapes (heads, width): {sorted(shapes)}")
        key_heads, head_width = shapes.pop()
        yield MemorySite(
            slot="memory",
            path=self._path(stack.base),
            dtype=layers[0].dtype,
            layers=len(layers),
            key_heads=key_heads,
            head_width=head_width,
            position=stack.position,
            length=self.length,
            window=min((site.window for site in layers if site.window), default=None),
            softcap=getattr(self.config, "attn_logit_softcapping", None),
        )

    # What is left ----------------------------------------------------------------------------------------------------

    def _leftovers(self, sites: list[Site]) -> Iterator[tuple[str, str]]:
        """List the modules with parameters that belong to no site, one line for the same module in all layers."""
        table = next(site for site in sites if isinstance(site, TableSite))
        owners = [site.path for site in sites if isinstance(site, LinearSite)]
        taken = {
            id(parameter) for path in owners for parameter in self.model.get_submodule(path).parameters(recurse=False)
        }
        shared = (table.path, *table.copies, *table.heads)
        taken |= {id(self.model.get_submodule(path).weight) for path in shared}
        lines: dict[str, str] = {}
        for path, module in self.model.named_modules():
            left = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in taken]
            taken |= {id(parameter) for parameter in left}
            if left:
                lines.setdefault(_pattern(path), self._reason(path, module, table))
        return iter(lines.items())

    def _reason(self, path: str, module: nn.Module, table: TableSite) -> str:
        inside = not self.prefix or path == self.prefix or path.startswith(f"{self.prefix}.")
        relative = _pattern(path[len(self.prefix) :].lstrip(".")) if inside else ""
        for start, reason in self.family.untouched.items():
            start = _pattern(start)
            if relative and (relative == start or relative.startswith(f"{start}.")):
                return reason
        if path in table.heads:
            return "bias of the tied head: stays unchanged"
        if module is self.model.get_output_embeddings():
            return "untied head: a matrix of its own, not shared with the token table"
        if "Norm" in type(module).__name__:
            return "normalisation: only a few numbers"
        return "outside the five slots" if inside else "task head: outside the five slots"


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _scale(table: nn.Module, width: int) -> float:
    """Return the factor by which the table multiplies its lookups.

    A buffer has no value on meta; it always holds the square root of the width (Gemma).
    """
    attributes, buffers = vars(table), dict(table.named_buffers(recurse=False))
    for name in ("scalar_embed_scale", "embed_scale"):
        if attributes.get(name) is not None:
            return float(attributes[name])
    return float(width) ** 0.5 if "embed_scale" in buffers else 1.0


def _window(config: object, layer: int) -> int | None:
    """Return the width of the model's own sliding window in this layer, None if the layer has none."""
    kinds = getattr(config, "layer_types", None)
    if kinds and "sliding" not in kinds[layer]:
        return None
    return getattr(config, "sliding_window", None)
