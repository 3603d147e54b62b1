"""What the importance of a token is made of: how often it occurs, and what one occurrence matters. Needs TAUT_DATA.

Words are sorted into parts of speech by closed lists (articles, determiners, prepositions, pronouns, auxiliaries,
conjunctions), and nouns, verbs and adjectives by lists of words that are hardly ever anything else and by endings
that decide (-tion, -ness, -ous). Tokens that are pieces of words, or in no list, are left out of the groups; a whole
token that opens a longer word ("go" in "go ##ing") is counted with its own entry of the table.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from harness import options, record
from torch import Tensor
from transformers import PreTrainedModel

from taut import data
from taut.architectures.locate import locate
from taut.core.record import Quantity
from taut.core.site import TableSite
from taut.methods.base import Calibration
from taut.ops.quantization.rowwise import RowFormat, pack, unpack
from taut.studies.statistics import rank_correlation, student_interval
from taut.surgery.calibration import calibrate, token_batches
from taut.surgery.loading import open_model, open_tokenizer, resolve

RANKED = 0.7
CLAIM = (
    f"minilm on WikiText-2: predicted loss ranks the true rise of rounded rows above {RANKED}; how far gradient norms "
    "are frequency, and whether verbs are more significant than articles, is shown"
)
WORDS = {
    "article": "a an the",
    "determiner": "this that these those each every some any no all both either neither another such",
    "preposition": "of in to for with on at from by about as into through after over between under against during "
    "without before among within upon across behind beyond toward towards beside despite until since near",
    "pronoun": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs "
    "myself yourself himself herself itself ourselves themselves who whom whose which what",
    "auxiliary": "am is are was were be been being have has had having do does did can could may might must shall "
    "should will would",
    "conjunction": "and or but nor so yet because although though while whereas if unless whether",
    "verb": "said says say went go goes gone became become becomes began begin begun wrote written writes made "
    "make makes took taken take takes gave given give gives got get gets found knew known know knows came "
    "come comes seen see sees kept keep keeps brought bring bought buy sold sell told tell thought think "
    "thinks sent send spent spend built build chosen choose chose drew drawn driven drove eaten eat "
    "fallen fell forgotten grown grew heard hear held hold hung killed leave learn lost lose meant met "
    "paid pay received receive remained remain sang sung sat seek sought shown spoken speak stood taught "
    "threw thrown understood wear wore won win described describe included include including involve "
    "involved produce produced provide provided publish published contain contained allow allowed create "
    "created follow followed require required announced appeared asked believe believed defeated "
    "destroyed died established joined moved occurred performed played reached released returned served "
    "suggested tried",
    "noun": "year years people city world war time government country states family school church river king army "
    "company album season team player song game village town island century police president battle water "
    "child children woman women man men father mother son daughter brother history music university "
    "hospital station road bridge castle tree animal species bird horse dog language story novel author "
    "artist member members population region district province",
    "adjective": "large small old new young great good bad early late long short high low big major minor important "
    "different similar rich poor strong weak happy common rare recent ancient modern local national "
    "military",
    "number": "one two three four five six seven eight nine ten hundred thousand million",
}
ENDINGS = {
    "noun": ("tion", "ment", "ness", "ity", "ship", "ism"),
    "adjective": ("ous", "ful", "able", "ible", "less", "ical"),
}
LONG_ENOUGH = 6
"""Letters of a word that its ending may decide about."""
BITS = 3


def groups(tokens: list[str]) -> dict[str, Tensor]:
    """The ids of each part of speech."""
    known = {word: group for group, words in WORDS.items() for word in words.split()}
    found: dict[str, list[int]] = {group: [] for group in (*WORDS, "digits", "punctuation")}
    for index, token in enumerate(tokens):
        group = known.get(token)
        if group is None and len(token) >= LONG_ENOUGH and token.isalpha():
            group = next((name for name, ends in ENDINGS.items() if token.endswith(ends)), None)
        if group is None and token.isdigit():
            group = "digits"
        if group is None and len(token) == 1 and not token.isalnum():
            group = "punctuation"
        if group is not None:
            found[group].append(index)
    return {group: torch.tensor(ids) for group, ids in found.items()}


def over_draws(values: list[float], unit: str) -> Quantity:
    """The mean over draws of text with Student's interval; a single draw has none."""
    if len(values) < 2:
        return Quantity(value=values[0], unit=unit, how="one draw of text")
    gap = student_interval(values)
    how = f"mean over {len(values)} draws of text, Student's interval"
    return Quantity(value=gap.value, unit=unit, how=how, low=gap.low, high=gap.high, samples=tuple(values))


def spearman(known: list[Calibration], of: str, least: int) -> tuple[Quantity, ...]:
    """Rank correlations with frequency over the rows seen ``least`` times: of the sum over occurrences, of the mean."""
    found = []
    for one in known:
        rows = one.frequency >= least
        frequency, total = one.frequency[rows], {"gradient": one.gradient, "sensitivity": one.sensitivity}[of][rows]
        found.append((rank_correlation(total, frequency), rank_correlation(total / frequency, frequency)))
    return tuple(over_draws(list(column), "") for column in zip(*found, strict=True))


def by_group(known: list[Calibration], tokens: list[str]) -> Iterator[dict[str, Any]]:
    for name, ids in groups(tokens).items():
        types = round(sum(int((one.frequency[ids] > 0).sum()) for one in known) / len(known))
        occurrences = [float(one.frequency[ids].sum() / one.frequency.sum()) for one in known]
        shares = [float(one.gradient[ids].sum() / one.gradient.sum()) for one in known]
        average = [float(one.gradient.sum() / one.frequency.sum()) for one in known]
        once = [float(one.gradient[ids].sum() / one.frequency[ids].sum()) for one in known]
        squares = [float(one.sensitivity[ids].sum() / one.sensitivity.sum()) for one in known]
        yield {
            "what": name,
            "types": types,
            "of occurrences": over_draws(occurrences, ""),
            "of gradient": over_draws(shares, ""),
            "of sensitivity": over_draws(squares, ""),
            "each, to the average": over_draws([a / b for a, b in zip(once, average, strict=True)], "x"),
        }


def contest(known: list[Calibration], tokens: list[str], first: str, second: str) -> list[dict[str, Any]]:
    """How many times as significant the first group is, per occurrence and in sum."""
    ids = groups(tokens)
    sums = [[float(one.gradient[ids[name]].sum()) for name in (first, second)] for one in known]
    counts = [[float(one.frequency[ids[name]].sum()) for name in (first, second)] for one in known]
    each = over_draws([s[0] / s[1] * c[1] / c[0] for s, c in zip(sums, counts, strict=True)], "x")
    total = over_draws([s[0] / s[1] for s in sums], "x")
    return [
        {"what": f"{first} / {second}, per occurrence", "each, to the average": each, "more": _above_one(each)},
        {"what": f"{first} / {second}, in sum", "of gradient": total, "more": _above_one(total)},
    ]


def _above_one(ratio: Quantity) -> str:
    low, high = (ratio.value, ratio.value) if ratio.low is None else (ratio.low, ratio.high)
    return "yes" if low > 1 else "no" if high < 1 else "undecided"


@torch.no_grad()
def finite_differences(
    model: PreTrainedModel, site: TableSite, known: Calibration, ids: Tensor, count: int
) -> tuple[list[float], list[float]]:
    """Predicted and true rise of half the summed squared change of hidden states when one row is rounded."""
    table = model.get_submodule(site.path).weight
    layout = RowFormat(BITS, site.width, site.width)
    rounded = unpack(pack(table, layout, clip=True), layout)
    order = known.frequency.argsort(descending=True)[: int((known.frequency > 0).sum())]
    # From the most frequent row to one seen once, evenly in the logarithm of the rank.
    ranks = torch.logspace(0, math.log10(len(order)), count).long().clamp(1, len(order)) - 1
    before = torch.cat([model(input_ids=piece)[0] for piece in ids.split(8)])
    predicted, risen = [], []
    for row in order[ranks.unique()].tolist():
        kept, touched = table[row].clone(), (ids == row).any(1).nonzero()[:, 0]
        predicted.append(float(known.sensitivity[row] * (rounded[row] - kept).square().sum() / 2))
        table[row] = rounded[row]
        pieces = [(model(input_ids=ids[some])[0] - before[some]).square().sum() for some in touched.split(8)]
        risen.append(float(sum(pieces)) / 2)
        table[row] = kept
    return predicted, risen


def main() -> int:
    arguments = options(CLAIM, seeds=3)
    seeds = range(1 if arguments.quick else arguments.seeds)
    source = resolve("minilm")
    model, tokenizer = open_model(source), open_tokenizer(source)
    site = next(site for site in locate(model).sites if isinstance(site, TableSite))
    needs = {site: frozenset({"frequency", "gradient", "sensitivity"})}
    texts = [text for text in data.calibration_texts("wikitext2:train") if len(text) > 80]
    known, whole = [], 40_000 if arguments.quick else 300_000
    for seed in seeds:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        text, size = [], 0
        while size < whole:
            text.append(texts[order.pop()])
            size += len(text[-1])
        known.append(calibrate(model, needs, token_batches(tokenizer, text, model), seed)[site.name])
    tokens = tokenizer.convert_ids_to_tokens(range(site.rows))

    rows: list[dict[str, Any]] = []
    for name, of in (("gradient norm", "gradient"), ("squared gradient", "sensitivity")):
        for least in (1, 5):
            for what, value in zip(("sum", "mean"), spearman(known, of, least), strict=True):
                where = f"{what} of {name} with frequency, rows seen {least} times or more: Spearman"
                rows.append({"what": where, "correlation": value})

    batches = token_batches(tokenizer, text, model)[: 3 if arguments.quick else 10]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    own = calibrate(model, needs, batches, 0)[site.name]
    predicted, risen = finite_differences(model, site, own, ids, 12 if arguments.quick else 40)
    found = rank_correlation(predicted, risen)
    ratios = sorted(true / guess for guess, true in zip(predicted, risen, strict=True))
    how = f"{len(risen)} rows rounded to {BITS} bits one at a time, {ids.numel()} tokens"
    correlation = Quantity(value=found, unit="", how=how)
    middle = (
        f"true over predicted rise: median {ratios[len(ratios) // 2]:.3g}, from {ratios[0]:.3g} to {ratios[-1]:.3g}"
    )
    promise = {"what": f"predicted and true loss, {len(risen)} rows: Spearman", "correlation": correlation}
    promise |= {"target": RANKED, "holds": found > RANKED, "remark": middle}
    rows.append(promise)

    rows += by_group(known, tokens)
    contests = contest(known, tokens, "verb", "article") + contest(known, tokens, "noun", "article")
    rows += contests
    answers = "; ".join(f"{row['what']}: {row['more']}" for row in contests)
    notes = (
        "gradient: summed norm of the gradient by the looked-up vector, of random signs through all hidden states, on "
        f"{len(seeds)} draws of {whole:,} characters of wikitext2:train; parts of speech by word lists and endings, "
        f"see the file. More significant? {answers}"
    )
    return record("token_importance", CLAIM, rows, promise["holds"], notes, arguments.quick)


if __name__ == "__main__":
    raise SystemExit(main())
