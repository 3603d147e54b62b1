"""Counting, timing and measuring in a new process: figures checked against what is known in advance."""

import gc
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import StaticCache

from taut.architectures.locate import locate
from taut.contract.tiny import inputs, tiny
from taut.core.errors import TautError
from taut.core.site import AttentionSite, LinearSite, MemorySite, TableSite
from taut.measurement import energy, memory, sandbox, speed
from taut.measurement.clock import CLOCKS, Prepared, Timing, compare, median_interval, ratio
from taut.measurement.count import _attention_flops, cache_bytes, count, flops_per_token, folder_bytes
from taut.measurement.sandbox import SandboxError, call

FAMILIES = ("bert", "gpt2", "llama", "llama_untied", "t5")
MIB = 2**20


class Recorder:
    """Cases that take a known time and record when they were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.collecting: list[bool] = []

    def case(self, name: str, seconds: float = 0.0025):
        def run() -> None:
            self.calls.append(name)
            self.collecting.append(gc.isenabled())
            time.sleep(seconds)

        return run


def test_cases_take_turns_and_everything_is_put_back():
    recorder, names, repeats = Recorder(), ["a", "b", "c"], 8
    threads = torch.get_num_threads()
    times = compare({name: recorder.case(name) for name in names}, repeats=repeats, warmup=0, threads=threads + 1)
    rounds = recorder.calls[-3 * repeats :]
    turns = [tuple(rounds[start : start + 3]) for start in range(0, len(rounds), 3)]
    assert all(sorted(turn) == names for turn in turns)
    assert len(set(turns)) > 1, "the order within a round must vary"
    assert not any(recorder.collecting)
    assert gc.isenabled()
    assert torch.get_num_threads() == threads
    assert all(len(times[name].samples) == repeats and times[name].threads == threads + 1 for name in names)
    assert all(sample >= 0.0025 for sample in times["a"].samples)


def test_a_short_case_is_called_until_a_sample_is_long_enough(monkeypatch: pytest.MonkeyPatch):
    """A clock that only the case moves."""
    calls = []
    monkeypatch.setitem(CLOCKS, "wall", lambda: len(calls) * 1e-6)
    times = compare({"short": lambda: calls.append(1)}, repeats=3, warmup=0, minimum_seconds=0.004)
    assert len(calls) >= 3 * 4000
    assert times["short"].median == pytest.approx(1e-6)


def test_preparation_is_repeated_each_time_and_not_timed():
    made, used = [], []

    def prepare() -> int:
        time.sleep(0.02)
        made.append(len(made))
        return made[-1]

    def run(number: int) -> None:
        used.append(number)
        time.sleep(0.003)

    times = compare({"case": Prepared(prepare, run)}, repeats=4, warmup=1, clock="wall")
    assert used == made
    assert min(times["case"].samples) < 0.02


def test_threads_and_collection_are_put_back_after_an_error():
    def broken() -> None:
        raise RuntimeError("broken case")

    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken case"):
        compare({"broken": broken}, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert gc.isenabled()


def test_the_ratio_pairs_the_samples_of_a_round():
    slow, fast = Timing((2.0, 40.0, 6.0), 1, "wall"), Timing((1.0, 10.0, 2.0), 1, "wall")
    result = ratio(slow, fast)
    assert result.samples == (2.0, 4.0, 3.0)
    assert (result.value, result.low, result.high) == (3.0, None, None)
    assert slow.per(2).samples == (1.0, 20.0, 3.0)
    assert slow.quantity().value == 6.0
    with pytest.raises(TautError, match="one run"):
        ratio(slow, Timing((1.0,), 1, "wall"))
    with pytest.raises(TautError, match="one run"):
        ratio(slow, Timing((1.0, 1.0, 1.0), 2, "wall"))


def test_the_interval_of_the_median_covers_it():
    assert median_interval(range(5)) == (None, None)
    assert median_interval(range(6)) == (0, 5)
    assert median_interval(range(20)) == (5, 14)
    draw, covered, trials = random.Random(0), 0, 2000
    for _ in range(trials):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(20)])
        covered += low <= 0.6931 <= high
    assert 0.94 < covered / trials < 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clock": "wll"}, "did you mean 'wall'"),
        ({"repeats": 0}, "repeats"),
        ({"clock": "cpu", "device": "cuda"}, "cannot measure"),
    ],
)
def test_wrong_timing_options_are_refused(options, message):
    with pytest.raises(TautError, match=message):
        compare({"case": lambda: None}, **options)
    with pytest.raises(TautError, match="empty"):
        compare({})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_footprint_is_what_the_saved_file_holds(family, dtype, tmp_path):
    model = tiny(family, dtype=dtype)
    footprint = count(model, locate(model).sites)
    model.save_pretrained(tmp_path)
    saved = folder_bytes(tmp_path)
    assert footprint.stored == saved.tensors
    assert footprint.file == pytest.approx(saved.total, rel=1e-3)
    assert saved.total == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert footprint.parameters == sum(one.numel() for one in model.parameters())
    assert footprint.resident >= footprint.stored
    for field in ("parameters", "stored", "resident"):
        assert sum(getattr(share, field) for share in footprint.slots.values()) == getattr(footprint, field)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_slots_hold_what_their_sites_say(family):
    model = tiny(family)
    sites = locate(model).sites
    shares = count(model, sites).slots
    for slot in ("embedding", "projection", "feedforward"):
        assert shares[slot].parameters == sum(site.dense().parameters for site in sites if site.slot == slot)
        assert shares[slot].stored == sum(site.dense().bytes for site in sites if site.slot == slot)


def test_packed_parts_count_as_the_parameters_they_stand_for():
    model = nn.ModuleDict({"packed": nn.Module(), "dense": nn.Linear(4, 3)})
    model["packed"].register_buffer("codes", torch.zeros(10, 2, dtype=torch.uint8))
    model["packed"].register_buffer("cached", torch.zeros(1000), persistent=False)
    model["packed"].weight = nn.Parameter(torch.zeros(5))
    footprint = count(model, logical={"packed": 40})
    assert footprint.parameters == 40 + 15
    assert footprint.stored == 20 + 20 + 60
    assert footprint.resident == footprint.stored + 4000
    assert count(model).parameters == 5 + 15


def test_a_tensor_belongs_to_the_innermost_site_around_it():
    """A table tied to a head outside all sites, a map inside a larger site, and a norm that belongs to none."""
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "block": nn.ModuleDict({"up": nn.Linear(4, 3)})})
    model["head"], model["norm"] = nn.Linear(4, 10, bias=False), nn.LayerNorm(4)
    model["head"].weight = model["table"].weight
    model["block"]["gate"] = nn.Linear(4, 2, bias=False)
    shape = {"head_width": 4, "key_heads": 1, "position": "rope", "length": 6}
    sites = [
        TableSite(slot="embedding", path="table", rows=10, width=4),
        AttentionSite(slot="attention", path="block", heads=1, causal=True, **shape),
        LinearSite(slot="projection", path="block.up", inputs=4, outputs=3),
        MemorySite(slot="memory", path="block", layers=1, **shape),
    ]
    footprint = count(model, sites)
    assert {slot: share.parameters for slot, share in footprint.slots.items()} == {
        **{"embedding": 40, "attention": 8, "projection": 15, "rest": 8},
    }
    assert {slot: (share.stored, share.resident) for slot, share in footprint.slots.items()} == {
        **{"embedding": (160, 160), "attention": (32, 32), "projection": (60, 60), "rest": (32, 32)},
    }
    assert (footprint.parameters, footprint.stored, footprint.resident) == (71, 284, 284)
    assert {name: one.value for name, one in footprint.quantities().items()} == {
        **{"parameters": 71, "stored": 284, "resident": 284},
    }


def test_memory_is_counted_by_storage_and_not_on_meta():
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer("view", torch.zeros(1000)[:10], persistent=False)
    model.kept = torch.zeros(3)
    model.same = model.weight.detach()
    assert count(model).resident == 64 + 4000 + 12
    skeleton = count(tiny("llama", device="meta"))
    assert skeleton.resident is None
    assert skeleton.quantities()["resident"].value is None
    assert skeleton.parameters == count(tiny("llama")).parameters
    assert skeleton.stored == count(tiny("llama")).stored


def test_the_predicted_header_is_exact(tmp_path):
    model = nn.Module()
    for name, dtype in (
        ("codes", torch.uint8),
        ("größe", torch.float32),
        ("ids", torch.int64),
        ("narrow", torch.float16),
    ):
        model.register_buffer(name, torch.zeros(7, 3).to(dtype))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert count(model).file == folder_bytes(tmp_path).total


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(TautError, match=r"no \*.safetensors"):
        folder_bytes(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(TautError, match="damaged"):
            folder_bytes(tmp_path)


def test_flops_count_every_map_and_every_pair():
    model = tiny("llama")
    batch = inputs(model, batch=2, length=12)
    sites = locate(model).sites
    maps = sum(
        site.dense().flops_per_token for site in sites if site.slot in ("embedding", "projection", "feedforward")
    )
    pairs = sum(4.0 * site.heads * site.head_width * 12 for site in sites if site.slot == "attention")
    assert flops_per_token(model, batch).value == pytest.approx(maps + pairs)


class TwoMaps(nn.Module):
    """Looks up 3 numbers a token, maps them to 4 and those to 5: 2 x 12 and 2 x 20 FLOPs a token."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 3)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, input_ids):
        return self.second(self.first(self.table(input_ids)))


@pytest.mark.parametrize(
    ("predicted", "value"),
    [
        (None, 24 + 40),
        ({}, 24 + 40),
        # What is counted inside a predicted part is replaced, once for all paths of a part.
        ({("first",): 100.0}, 100 + 40),
        ({("first",): 100.0, ("second",): 7.0}, 100 + 7),
        ({("first", "second"): 100.0}, 100),
        # The counter sees nothing in a lookup, so the prediction is added.
        ({("table",): 1000.0}, 24 + 40 + 1000),
    ],
)
def test_predicted_flops_replace_counted_ones(predicted, value):
    result = flops_per_token(TwoMaps(), {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, predicted)
    assert result.value == pytest.approx(value)
    assert (result.unit, "(2, 3)" in result.how) == ("FLOPs/token", True)
    assert (f"{len(predicted)} parts" in result.how) if predicted else ("parts" not in result.how)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_attention_flops_count_all_pairs(heads, key_heads):
    """Keys of width 8 and values of width 6: 14 multiply-adds of two FLOPs for each of 5 x 7 pairs of a head."""
    assert _attention_flops((2, heads, 5, 8), (2, key_heads, 7, 8), (2, key_heads, 7, 6)) == 2 * heads * 35 * 14 * 2


@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("gpt2", 2)])
def test_cache_bytes_are_those_of_keys_and_values(family, layers):
    model = tiny(family)
    batch = inputs(model, batch=2, length=12)
    heads = 2 if family == "llama" else 4
    assert cache_bytes(speed.filled_cache(model, batch)) == 2 * layers * heads * 8 * 4 * 2 * 12
    assert speed.filled_cache(tiny("bert"), inputs(tiny("bert"))) is None


def test_cache_bytes_see_what_is_allocated_and_both_caches_of_an_encoder_decoder():
    model = tiny("llama")
    static = StaticCache(config=model.config, max_cache_len=64)
    model(**inputs(model, batch=2, length=12), past_key_values=static)
    assert 2 * 2 * 2 * 8 * 4 * 2 * 64 <= cache_bytes(static) < 2 * 2 * 2 * 8 * 4 * 2 * 64 + 1024
    model = tiny("t5")
    assert cache_bytes(speed.filled_cache(model, inputs(model, batch=2, length=12))) == 2 * (2 * 2 * 4 * 8 * 4 * 2 * 12)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_speed_times_decoding_for_decoders_only(family):
    models = {name: tiny(family) for name in ("one", "two")}
    batch = inputs(models["one"], batch=2, length=6)
    caches = {"one": lambda: StaticCache(config=models["one"].config, max_cache_len=16)} if family == "llama" else {}
    results = speed.speed(models, batch, decode_tokens=3, repeats=2, warmup=1, caches=caches)
    for one in results.values():
        taken = one.quantities()
        assert taken["throughput"].value == pytest.approx(12 / taken["forward"].value)
        assert ("decode" in taken) == (family != "bert")
        if family != "bert":
            assert taken["decode_throughput"].value == pytest.approx(2 / taken["decode"].value)
            assert all(quantity.value > 0 for quantity in taken.values())


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_decoding_starts_each_time_from_the_same_cache(family):
    model = tiny(family)
    batch = inputs(model, batch=1, length=5)
    case = speed.decode_case(model, batch, tokens=3)
    first = case.prepare()
    case.run(first)
    assert first.get_seq_length() == 5 + 3
    assert case.prepare().get_seq_length() == 5


def test_padded_inputs_and_models_that_do_not_decode_are_refused():
    model = tiny("llama")
    batch = inputs(model, batch=2, length=6)
    batch["attention_mask"][0, 0] = 0
    with pytest.raises(TautError, match="padding"):
        speed.decode_case(model, batch, 2)
    with pytest.raises(TautError, match="decoding needs a model with a cache"):
        speed.decode_case(tiny("bert"), inputs(tiny("bert")), 2)


def test_a_new_process_answers_and_reports_its_own_peak():
    held = torch.ones(64 * MIB)
    outcome = call("sandboxed:multiply", {"a": 6, "b": 7})
    assert outcome.result["product"] == 42
    assert 5 * MIB < outcome.peak_bytes < sandbox.peak_bytes() - 256 * MIB
    assert held.nbytes == 256 * MIB


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("mistake", TautError, "^one line for the user$"),
        ("crash", SandboxError, "ZeroDivisionError: nothing by nothing"),
        ("killed", SandboxError, "out of memory"),
        ("left", SandboxError, "exit code 3"),
        ("nonsense", SandboxError, "not JSON serializable"),
    ],
)
def test_what_goes_wrong_there_is_said_here(kind, error, message):
    with pytest.raises(error, match=message) as caught:
        call("sandboxed:fail", {"kind": kind})
    if error is SandboxError:
        assert "last words" in caught.value.stderr


@pytest.mark.parametrize("target", ["sandboxed:nothing", "no_such_module:function", "nothing"])
def test_a_target_that_names_no_function_is_a_mistake(target):
    with pytest.raises(TautError, match="names no function"):
        call(target)


def test_time_out_and_the_death_of_the_parent_end_the_child(tmp_path):
    marker = tmp_path / "pid"
    with pytest.raises(SandboxError, match="not done after"):
        call("sandboxed:sleep", {"seconds": 60, "marker": str(marker)}, timeout=5)
    assert _gone(int(marker.read_text()))
    marker.unlink()
    arguments = {"seconds": 60, "marker": str(marker)}
    script = f"from taut.measurement.sandbox import call; call('sandboxed:sleep', {arguments})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    while not marker.exists() or not marker.read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert _gone(int(marker.read_text()))


def _gone(process: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{process}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_the_peak_of_a_block_is_what_it_allocates():
    extra = call("sandboxed:fill", {"mebibytes": 200}).result["extra"]
    assert 195 * MIB < extra < 215 * MIB


def test_peak_memory_of_a_saved_model_holds_at_least_its_weights(tmp_path):
    model = tiny("llama", hidden_size=512, intermediate_size=2048)
    model.save_pretrained(tmp_path)
    sizes = memory.peak_memory(tmp_path, batch=1, length=16)
    assert sizes["peak"].value > count(model).resident
    assert 0 <= sizes["forward"].value < sizes["peak"].value


def test_energy_is_read_where_it_can_be_and_null_elsewhere(tmp_path):
    assert energy.energy(lambda: None, powercap=tmp_path).value is None
    for name, joules in (("intel-rapl:0", 9_000_000), ("intel-rapl:1", 0), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{joules}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")

    def spend() -> None:
        """One joule on each package; the first counter starts again at ten."""
        for package in (0, 1):
            path = tmp_path / f"intel-rapl:{package}" / "energy_uj"
            path.write_text(str((int(path.read_text()) + 1_000_000) % 10_000_000))
        time.sleep(0.03)

    result = energy.energy(spend, minimum_seconds=0.08, powercap=tmp_path)
    assert result.value == pytest.approx(2.0)
    assert result.unit == "J"


def test_the_clock_names_its_conditions():
    description = Timing((1.0, 2.0), 2, "cpu").describe()
    assert description == "2 interleaved samples, cpu clock, 2 threads, cpu"
