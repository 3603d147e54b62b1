"""What calibration text shows: counts without a pass, gradients against plain autograd, and nothing left behind."""

import pytest
import torch
from scipy.stats import spearmanr
from tiny_tokenizer import SIZE, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from taut.architectures.locate import locate
from taut.contract.tiny import VOCABULARY, inputs, padded_inputs, tiny
from taut.core.errors import TautError
from taut.core.site import LinearSite, TableSite
from taut.methods.base import Calibration
from taut.ops.quantization.rowwise import RowFormat, pack, unpack
from taut.surgery.calibration import TOKENS, _scaled, _spread, calibrate, token_batches

EVERYTHING = frozenset({"frequency", "gradient", "sensitivity", "metric"})


def site_of(model: PreTrainedModel) -> TableSite:
    return next(site for site in locate(model).sites if isinstance(site, TableSite))


def statistics(model: PreTrainedModel, batches: list[dict[str, Tensor]], **options) -> Calibration:
    site = site_of(model)
    return calibrate(model, {site: EVERYTHING}, batches, **options)[site.name]


def zipf(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Ids that occur about as often as Zipf's law has it."""
    share = 1 / torch.arange(1.0, VOCABULARY - 4)
    ids = torch.multinomial(share, batch * length, True, generator=torch.Generator().manual_seed(seed))
    ids = ids.view(batch, length) + 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def assert_same(first: Calibration, second: Calibration, rtol: float = 1e-5) -> None:
    for name in ("frequency", "gradient", "sensitivity", "metric"):
        one, other = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


def test_counts_need_no_pass_and_know_padding_and_decoders():
    model = tiny("t5")
    batches = [padded_inputs(model, batch=3, length=10, seed=seed) for seed in range(2)]
    batches[1]["decoder_attention_mask"] = torch.ones(3, 10, dtype=torch.long)
    batches[1]["decoder_attention_mask"][0, 4:] = 0
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    for batch in batches:
        for key, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            marks = batch.get(mask, torch.ones_like(batch[key]))
            for token, mark in zip(batch[key].flatten().tolist(), marks.flatten().tolist(), strict=True):
                expected[token] += mark
    site = site_of(model)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    calibration = calibrate(model, {site: frozenset({"frequency"})}, batches, seed=7)[site.name]
    assert torch.equal(calibration.frequency, expected)
    assert calibration.seed == 7
    assert not calls
    assert calibration.gradient is calibration.sensitivity is calibration.metric is calibration.gram is None
    batches[0]["input_ids"][0, 0] = VOCABULARY
    with pytest.raises(TautError, match="token id 96; embedding has ids 0 to 95"):
        calibrate(model, {site: frozenset({"frequency"})}, batches)


def test_without_text_there_is_the_seed_alone():
    model = tiny("bert")
    sites = {site: EVERYTHING for site in locate(model).sites if isinstance(site, TableSite | LinearSite)}
    for calibration in calibrate(model, sites, [], seed=3).values():
        assert calibration == Calibration(seed=3)


def test_input_side_of_an_untied_decoder_is_plain_autograd():
    model = tiny("llama_untied", dtype=torch.float64)
    batch = inputs(model, batch=3, length=9)
    calibration = statistics(model, [batch])
    vectors = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=vectors, attention_mask=batch["attention_mask"])["logits"]
    labels = batch["input_ids"][:, 1:]
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").backward()
    rows, ids = vectors.grad.flatten(0, 1), batch["input_ids"].flatten()
    squares = torch.zeros(VOCABULARY, dtype=torch.float64).index_add(0, ids, rows.square().sum(1))
    norms = torch.zeros(VOCABULARY, dtype=torch.float64).index_add(0, ids, rows.norm(dim=1))
    torch.testing.assert_close(calibration.sensitivity, squares / 32, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(calibration.gradient, norms, rtol=1e-5, atol=1e-6)
    # The last position of each sequence predicts nothing.
    torch.testing.assert_close(calibration.metric, rows.T @ rows / 24, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(calibration.frequency, torch.bincount(ids, minlength=VOCABULARY).double())


def test_a_tied_head_adds_its_share_position_by_position():
    model = tiny("gpt2", dtype=torch.float64)
    batch = inputs(model, batch=2, length=7)
    calibration = statistics(model, [batch])
    vectors = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    output = model(inputs_embeds=vectors, attention_mask=batch["attention_mask"], output_hidden_states=True)
    hidden, labels = output["hidden_states"][-1][:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
    slopes = output["logits"][:, :-1].flatten(0, 1).softmax(-1) - F.one_hot(labels, VOCABULARY)
    gradients = slopes[:, :, None] * hidden[:, None, :]
    F.cross_entropy(output["logits"][:, :-1].flatten(0, 1), labels, reduction="sum").backward()
    rows = vectors.grad.flatten(0, 1)
    squares = torch.zeros(VOCABULARY, dtype=torch.float64).index_add(
        0, batch["input_ids"].flatten(), rows.square().sum(1)
    )
    expected = (squares + gradients.square().sum((0, 2))) / 32
    torch.testing.assert_close(calibration.sensitivity, expected, rtol=1e-5, atol=1e-8)
    flat = gradients.flatten(0, 1)
    torch.testing.assert_close(calibration.metric, (rows.T @ rows + flat.T @ flat) / 12, rtol=1e-5, atol=1e-7)


def test_a_scaled_lookup_counts_the_stored_row():
    """Gemma multiplies what it looks up: an error of the stored row arrives that much larger."""
    model = tiny("gemma", dtype=torch.float64, tie_word_embeddings=False)
    batch = inputs(model, batch=2, length=8)
    calibration = statistics(model, [batch])
    table = model.get_input_embeddings().weight
    logits = model(**batch)["logits"][:, :-1].flatten(0, 1)
    (gradient,) = torch.autograd.grad(
        F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum"), table
    )
    once = (torch.bincount(batch["input_ids"].flatten(), minlength=VOCABULARY) == 1).nonzero()[:, 0]
    assert len(once) > 3
    torch.testing.assert_close(calibration.sensitivity[once], gradient[once].square().sum(1) / 32, rtol=1e-5, atol=1e-6)


def test_without_a_head_random_signs_give_the_gauss_newton_matrix():
    model = tiny("bert", head="base", dtype=torch.float64)
    batch = {"input_ids": torch.tensor([[7, 8, 9, 7]])}
    vectors = model.get_input_embeddings()(batch["input_ids"]).detach()

    def states(vectors: Tensor) -> Tensor:
        return model(inputs_embeds=vectors)[0]

    jacobian = torch.autograd.functional.jacobian(states, vectors).reshape(4 * 32, 4, 32)
    exact = torch.zeros(VOCABULARY, dtype=torch.float64)
    exact.index_add_(0, batch["input_ids"][0], jacobian.square().sum((0, 2)) / 32)
    drawn = torch.stack([statistics(model, [batch], seed=seed).sensitivity for seed in range(150)])
    # Four standard errors of the mean of the draws.
    assert ((drawn.mean(0) - exact).abs() <= 4 * drawn.std(0) / 150**0.5 + 1e-12).all()
    torch.testing.assert_close(drawn.mean(0), exact, rtol=0.15, atol=1e-9)


def test_predicted_loss_ranks_the_true_rise_of_rounded_rows():
    model = tiny("bert", head="base", dtype=torch.float64)
    text = zipf(model, 12, 24)
    calibration = statistics(model, [text])
    table = model.get_input_embeddings().weight
    layout = RowFormat(3, 32, 32)
    with torch.no_grad():
        before, rounded = model(**text)[0], unpack(pack(table, layout), layout).double()
        predicted, risen = [], []
        for row in calibration.frequency.nonzero()[:, 0].tolist():
            kept = table[row].clone()
            predicted.append(float(calibration.sensitivity[row] * (rounded[row] - kept).square().sum() / 2))
            table[row] = rounded[row]
            risen.append(float((model(**text)[0] - before).square().sum() / 2))
            table[row] = kept
    assert len(risen) > 40
    assert spearmanr(predicted, risen).statistic > 0.8
    ratios = torch.tensor(risen) / torch.tensor(predicted)
    assert 0.7 < ratios.median() < 1.4


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "gemma3", "bart", "t5", "llama_untied"])
@pytest.mark.parametrize("head", ["default", "base"])
def test_every_family_gives_statistics_that_padding_and_batching_do_not_change(family, head):
    model = tiny(family, head=head)
    batch = padded_inputs(model, batch=3, length=14)
    calibration = statistics(model, [batch])
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][batch["attention_mask"] == 0] = 50
    assert_same(statistics(model, [other]), calibration)
    if head == "default":
        alone = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3)]
        assert_same(statistics(model, alone), calibration, rtol=1e-4)
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    seen[batch["input_ids"][batch["attention_mask"].bool()]] = True
    if "decoder_input_ids" in batch:
        seen[batch["decoder_input_ids"]] = True
    assert not calibration.gradient[~seen].any()
    assert (calibration.sensitivity[~seen] > 0).any() == bool(site_of(model).heads)
    assert calibration.gradient[seen].count_nonzero() >= seen.sum() - 3
    assert_same(statistics(model, [batch]), calibration, rtol=0)


def test_masked_models_that_name_their_mask_predict_a_share_of_the_tokens():
    model = tiny("bert")
    model.config.mask_token_id = 4
    text = zipf(model, 8, 32)
    first, second = (statistics(model, [text], seed=seed) for seed in (0, 1))
    # The masked places look up the mask instead; which they are follows the seed.
    assert first.gradient[4] > 0
    assert first.frequency[4] == 0
    assert not torch.equal(first.sensitivity, second.sensitivity)
    assert_same(statistics(model, [text], seed=1), second, rtol=0)


def test_a_classifier_counts_by_its_own_output():
    model = tiny("bert", head="BertForSequenceClassification")
    batch = padded_inputs(model) | {"labels": torch.tensor([0, 1])}
    calibration = statistics(model, [batch])
    assert calibration.gradient[batch["input_ids"][0]].min() > 0
    assert calibration.gradient[model.config.pad_token_id] == 0


def test_of_a_long_text_evenly_spaced_batches_stand_for_all():
    """A text that repeats itself: what is scaled up from a part equals a multiple of one repetition."""
    model = tiny("gpt2")
    batch = zipf(model, 8, 128)
    once = statistics(model, [batch])
    repeats = 3 * TOKENS // batch["input_ids"].numel()
    short = [{name: tensor[:, :16] for name, tensor in batch.items()}] * (3 * TOKENS // 128)
    assert sum(one["input_ids"].numel() for one in _spread(short)) == TOKENS
    assert _spread(short[:10]) == short[:10]
    whole = statistics(model, [batch] * repeats)
    for name in ("frequency", "gradient", "sensitivity"):
        torch.testing.assert_close(getattr(whole, name), repeats * getattr(once, name), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(whole.metric, once.metric, rtol=1e-4, atol=1e-12)


def test_a_row_that_only_the_rest_of_the_text_uses_gets_the_mean_of_an_occurrence():
    model = tiny("bert")
    site = site_of(model)
    part, rest = {"input_ids": torch.full((2, 8), 7)}, {"input_ids": torch.full((2, 8), 9)}
    sums = {name: torch.zeros(site.rows, dtype=torch.float64) for name in ("gradient", "sensitivity")}
    sums["gradient"][7], sums["sensitivity"][7] = 16.0, 8.0
    scaled = _scaled(site, sums, [part], [part, rest])
    assert scaled["gradient"][[7, 9]].tolist() == [32.0, 16.0]
    assert scaled["sensitivity"][[7, 9]].tolist() == [16.0, 8.0]


def test_the_model_is_left_as_it_was_found():
    model = tiny("llama")
    model.train()
    model.model.layers[0].eval()
    frozen = model.model.layers[1].mlp.up_proj.weight
    frozen.requires_grad_(False)
    table = model.get_input_embeddings().weight
    table.grad = torch.ones_like(table)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wishes = [parameter.requires_grad for parameter in model.parameters()]
    batch = inputs(model)
    needs = {
        site: EVERYTHING if isinstance(site, TableSite) else frozenset({"gram"})
        for site in locate(model).sites
        if isinstance(site, TableSite | LinearSite)
    }
    calibrate(model, needs, [batch])
    with pytest.raises(ValueError, match="inputs_embeds"):
        calibrate(model, needs, [batch | {"inputs_embeds": torch.zeros(2, 12, 32)}])
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wishes
    assert torch.equal(table.grad, torch.ones_like(table))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not table)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_text_shorter_than_a_sequence_is_one_short_sequence_and_none_is_none():
    tokenizer, model = tiny_tokenizer(begin=False), tiny("llama", vocab_size=SIZE)
    assert token_batches(tokenizer, [""], model) == []
    ids = tokenizer("a little text")["input_ids"]
    (batch,) = token_batches(tokenizer, ["a little text"], model)
    assert batch["input_ids"].tolist() == [ids]
    (batch,) = token_batches(tokenizer, ["a little text"] * 3, model, length=2 * len(ids))
    assert batch["input_ids"].tolist() == [ids * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_linear_maps_are_given(dtype: torch.dtype):
    """Gram matrices and ranges against the inputs themselves, real tokens only; nobody asks, nobody gets."""
    model = tiny("bert", dtype=dtype)
    batches = [padded_inputs(model, batch=3, length=10, seed=seed) for seed in range(2)]
    sites = [site for site in locate(model).sites if isinstance(site, LinearSite)]
    fields = [{"gram", "least", "greatest"}, {"gram"}, {"least", "greatest"}, set()]
    needs = {site: frozenset(fields[index % 4]) for index, site in enumerate(sites)}
    calibrations = calibrate(model, needs, batches)
    for site, wanted in needs.items():
        seen: list[Tensor] = []
        handle = model.get_submodule(site.path).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        masks = [batch["attention_mask"].bool() for batch in batches]
        x = torch.cat([tensor[mask] for tensor, mask in zip(seen, masks, strict=True)]).float()
        calibration = calibrations[site.name]
        assert {name for name in ("gram", "least", "greatest") if getattr(calibration, name) is not None} == wanted
        if "gram" in wanted:
            torch.testing.assert_close(calibration.gram, (x.T @ x).double() / len(x), rtol=1e-5, atol=1e-6)
            assert torch.linalg.eigvalsh(calibration.gram).min() > -1e-6
        if "least" in wanted:
            assert torch.equal(calibration.least, x.amin(0))
            assert torch.equal(calibration.greatest, x.amax(0))
