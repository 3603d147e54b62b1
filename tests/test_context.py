"""Effective context length: the algorithm by hand and by what must hold, the losses by single passes, the verb."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from tiny_tokenizer import SIZE, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

import taut
from taut import cli
from taut.contract.tiny import tiny
from taut.core.errors import TautError
from taut.evaluation._language import last_logits, logits
from taut.evaluation.context_gain import effective_contexts, relative_gains
from taut.evaluation.effective_context import losses_at

TEXT = "The statement is executed once. An exception is raised if no handler is found; naïve code fails.\n" * 4


def model(memory: dict | None = None, family: str = "llama") -> PreTrainedModel:
    subject = tiny(family, vocab_size=SIZE, dtype=torch.float64)
    return taut.apply(subject, {"memory": memory}) if memory else subject


def window(size: int) -> dict:
    return {"method": "window_sink", "sinks": 0, "window": size}


def falling(models: int, contexts: int, positions: int, seed: int = 0) -> Tensor:
    """Losses that fall with context, for some models and positions faster than for others."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(models, contexts, positions, generator=generator, dtype=torch.float64) / contexts
    return 3 + torch.rand(positions, generator=generator, dtype=torch.float64) - steps.cumsum(1)


# The algorithm


def test_two_models_worked_out_by_hand():
    """Half of four positions, threshold .01. At 10 the least losses are 3, 3, 2, 1: the first two count, mean 3."""
    first = [[4.0, 3.0, 2.0, 1.0], [2.0, 3.5, 0.1, 0.1], [1.99, 3.0, 5.0, 5.0]]
    second = [[3.0, 4.0, 2.0, 2.0], [3.0, 2.99, 2.5, 2.2], [0.0, 0.0, 0.0, 0.0]]
    one, two = effective_contexts(torch.tensor([first, second], dtype=torch.float64), (10, 20, 30), 0.5)
    # To 20: the first has 2 and, not below the baseline, 3; the second 3 and 2.99.
    # At 20 the least are 2, 2.99, .1, .1: mean 2.495 of the first two. To 30: 1.99 and 2.99; then 0 and 0.
    assert one.gains == pytest.approx((1 - math.exp(2.5 - 3), 1 - math.exp(2.49 - 2.495)), rel=1e-12)
    assert two.gains == pytest.approx((1 - math.exp(2.995 - 3), 1 - math.exp(0 - 2.495)), rel=1e-12)
    assert (one.tokens, one.at_least) == (20, False)
    # The second stops at its first step, whatever comes later.
    assert (two.tokens, two.at_least) == (10, False)


@pytest.mark.parametrize("hardest", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("last", range(5))
def test_a_model_whose_loss_stops_falling_has_that_context(hardest: float, last: int):
    losses = falling(1, 5, 40)
    losses[:, last:] = losses[:, last : last + 1]
    (context,) = effective_contexts(losses, (8, 16, 24, 32, 40), hardest, 1e-9)
    assert context.tokens == (8, 16, 24, 32, 40)[last] == context.low == context.high
    assert context.at_least == (last == 4)


@pytest.mark.parametrize("hardest", [0.1, 1.0])
def test_equal_models_are_equal_and_as_one_alone(hardest: float):
    losses = falling(1, 6, 50)
    alone, *twins = (
        context
        for count in (1, 3)
        for context in effective_contexts(losses.expand(count, -1, -1), range(4, 28, 4), hardest, 0.02)
    )
    assert [alone] * 3 == twins


def test_all_positions_of_one_model_are_plain_means():
    losses = falling(1, 6, 50)
    means = losses[0].mean(1)
    plain = 1 - torch.exp(means[1:] - means[:-1])
    torch.testing.assert_close(relative_gains(losses, 1.0)[0], plain, rtol=1e-12, atol=1e-12)


def test_a_hopeless_model_changes_nothing_for_the_others_and_has_the_shortest():
    losses = falling(3, 5, 60)
    losses[2] += 100
    for hardest in (0.1, 1.0):
        torch.testing.assert_close(
            relative_gains(losses, hardest)[:2], relative_gains(losses[:2], hardest), rtol=0, atol=0
        )
        hopeless = effective_contexts(losses, (1, 2, 3, 4, 5), hardest)[2]
        assert (hopeless.tokens, hopeless.high) == (1, 1)
        assert hopeless.gains == (0.0,) * 4


def test_order_and_a_constant_do_not_matter():
    losses = falling(3, 5, 64, seed=2)
    gains = relative_gains(losses, 0.25)
    torch.testing.assert_close(relative_gains(losses[[2, 0, 1]], 0.25), gains[[2, 0, 1]], rtol=0, atol=0)
    mixed = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(relative_gains(losses[:, :, mixed], 0.25), gains, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(relative_gains(losses + 2.5, 0.25), gains, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("hardest", [0.07, 0.1, 0.3, 1 / 3, 1.0])
def test_only_the_hardest_positions_count(hardest: float):
    losses = falling(2, 2, 30)
    count = math.ceil(round(30 * hardest, 6))
    places = losses[:, 0].amin(0).argsort(descending=True)
    changed = losses.clone()
    changed[:, 1, places[count:]] = 0
    torch.testing.assert_close(relative_gains(changed, hardest), relative_gains(losses, hardest), rtol=0, atol=0)
    changed[:, 1, places[count - 1]] = 0
    assert (relative_gains(changed, hardest) > relative_gains(losses, hardest)).all()


def test_the_interval_is_wide_where_few_positions_decide():
    losses = torch.full((1, 3, 30), 2.0, dtype=torch.float64)
    losses[0, 1:, 0] = 0.5
    (context,) = effective_contexts(losses, (1, 2, 3), 1.0)
    # One position of 30 gains 1.5 nats, .05 on the mean; drawn again, it is missing in (29/30)^30 = 36 % of the draws.
    assert (context.tokens, context.low, context.high) == (2, 1, 2)
    assert effective_contexts(losses, (1, 2, 3), 1.0) == [context]


@pytest.mark.parametrize(
    ("contexts", "options", "words"),
    [
        ((1, 2, 4), {}, "evenly spaced and rising"),
        ((1,), {}, "evenly spaced and rising"),
        ((3, 2, 1), {}, "evenly spaced and rising"),
        ((1, 2), {}, r"losses of shape \(2, 3, 9\): expected \(models, 2, positions\)"),
        ((1, 2, 3), {"hardest": 0.0}, "hardest = 0.0: expected a share"),
        ((1, 2, 3), {"hardest": 1.5}, "hardest = 1.5: expected a share"),
        ((1, 2, 3), {"threshold": 0.0}, "threshold = 0.0: expected a number above 0"),
    ],
)
def test_wrong_numbers_are_refused(contexts: tuple[int, ...], options: dict, words: str):
    with pytest.raises(TautError, match=words):
        effective_contexts(falling(2, 3, 9), contexts, **options)


# The losses


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("cached", [None, 1, 5])
@pytest.mark.parametrize("begin", [(), (1,)])
def test_losses_by_single_passes(family: str, cached: int | None, begin: tuple[int, ...]):
    subject = model(family=family)
    ids = tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    places, contexts = [20, 33, 60], [1, 4, 20]
    losses = losses_at(subject, ids, begin, contexts, places, 2, cached, lambda done: None)
    for length, row in zip(contexts, losses, strict=True):
        for place, loss in zip(places, row.tolist(), strict=True):
            seen = torch.tensor([[*begin, *ids[place - length + len(begin) : place]]])
            assert seen.shape[1] == length
            with torch.no_grad():
                expected = -subject(input_ids=seen).logits[0, -1].log_softmax(-1)[ids[place]]
            assert loss == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("memory", [None, window(3), {"method": "anchor", "every": 4}])
@pytest.mark.parametrize("cached", [None, 3])
def test_the_last_logits_are_the_last_of_all(memory: dict | None, cached: int | None):
    subject = model(memory)
    rows = torch.randint(5, SIZE, (3, 17), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        last, every = last_logits(subject, rows, cached), logits(subject, rows, cached)
    torch.testing.assert_close(last, every[:, -1], rtol=1e-12, atol=1e-12)


def test_a_window_reaches_as_far_as_its_layers_carry(tmp_path: Path):
    """Two layers of window w see 2 (w - 1) + 1 tokens; more context changes nothing, less does. Alone in its group,
    a model whose losses change at all gains on some position, so its effective context is the first step that holds
    its reach, and it grows with the window."""
    (tmp_path / "text.txt").write_text(TEXT)
    reached = {}
    for size in (2, 4, 8, None):
        result = taut.context(
            model(window(size) if size else None),
            tmp_path / "text.txt",
            tokenizer=tiny_tokenizer(begin=False),
            **{"shortest": 2, "step": 2, "longest": 24, "positions": 60, "hardest": 0.5, "threshold": 1e-5},
        )
        (alone,) = result.results
        reached[size] = alone.tokens
        assert alone.at_least == (size is None)
        assert all(abs(gain) < 1e-6 for gain in alone.gains[alone.tokens // 2 - 1 :] if size)
    assert reached == {2: 4, 4: 8, 8: 16, None: 24}


# The verb


def test_the_verb_tells_everything(tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT)
    seen: list[tuple[int, int]] = []
    group = [model(), model(window(3))]
    options = {"tokenizer": tiny_tokenizer(), "shortest": 4, "step": 4, "longest": 16, "positions": 10}
    result = taut.context(
        group, tmp_path / "text.txt", **options, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (80, 80)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    content = json.loads(json.dumps(result.to_dict()))
    assert content["contexts"] == [4, 8, 12, 16]
    assert [row["model"] for row in content["models"]] == ["LlamaForCausalLM"] * 2
    assert content["settings"]["positions"] == 10
    assert content["settings"]["group"] == ["LlamaForCausalLM"] * 2
    assert content["settings"]["opening"].startswith("BOS")
    assert all(len(row["gains"]) == 3 and len(row["losses"]) == 4 for row in content["models"])
    smaller = taut.context(group, tmp_path / "text.txt", **options, batch_size=3)
    for one, other in zip(result.losses, smaller.losses, strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert [context.tokens for context in smaller.results] == [context.tokens for context in result.results]


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    folder = tiny_folder(tmp_path / "llama")
    light = tmp_path / "light"
    taut.apply(folder, {"memory": window(3)}, out=light, text=None)
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--data", tmp_path / "text.txt", "--shortest", 4, "--step", 4, "--longest", 16, "--positions", 20]

    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["taut", "context", *map(str, arguments)])
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code or 0
        return code, *capfd.readouterr()

    code, out, err = run(folder, light, *words, "--json")
    assert code == 0, err
    rows = json.loads(out.strip().splitlines()[-1])["models"]
    assert [row["model"] for row in rows] == [str(folder), str(light)]
    # The window of 3 reaches 5 tokens: nothing changes from 8 on.
    assert rows[1]["losses"][1:] == pytest.approx([rows[1]["losses"][1]] * 3, abs=1e-5)
    code, out, err = run(folder, light, *words)
    assert code == 0, err
    assert "effective context" in out
    assert "12 to 16" in out
    other = tiny_folder(tmp_path / "other")
    tiny_tokenizer().save_pretrained(other)
    code, out, err = run(folder, other, *words)
    assert code == 2
    assert "give models with the same tokenizer" in err.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"longest": 15}, "longest = 15 is not reached from shortest = 4 in steps of 4; the nearest is 16"),
        ({"longest": 4}, "the nearest is 8"),
        ({"positions": 0}, "positions = 0: expected at least 1"),
        ({"cached": 0}, "cached = 0: expected at least 1"),
        ({"longest": 400}, "longest = 400: LlamaForCausalLM reads at most 128 tokens"),
        ({"longest": 100, "limit": 60}, r"the text has \d+ tokens; expected more than longest = 100"),
        ({"tokenizer": None}, "LlamaForCausalLM has no tokenizer; give tokenizer="),
        ({"hardest": 2.0}, "hardest = 2.0"),
    ],
)
def test_wrong_input_is_told(options: dict, words: str, tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = {"tokenizer": tiny_tokenizer(), "shortest": 4, "step": 4, "longest": 16, "positions": 4} | options
    with pytest.raises(TautError, match=words):
        taut.context([model()], tmp_path / "text.txt", **arguments)


def test_groups_are_of_decoders_and_not_empty():
    with pytest.raises(TautError, match="give at least one model"):
        taut.context([])
    with pytest.raises(TautError, match="BertForMaskedLM does not predict the next token"):
        taut.context([tiny("bert", vocab_size=SIZE)], tokenizer=tiny_tokenizer(encoder=True))
