"""The page is whole, honest, reachable and the same every time; tables agree in all three forms."""

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.findings import Findings, ReportConfig, find
from pipeline.page import Column, Table, to_csv, to_html, to_markdown, with_intervals
from pipeline.rate import rate_exhibit
from pipeline.report import Records, Report, agreement_words, build
from pipeline.results import Results, read_results
from pipeline.statistics import Interval
from storage.workspace import read_json
from tests.pipeline.synthetic import LOSSES, World, write_records, write_results

WORLD = World(
    prompts=30,
    decoded=15,
    depth=5,
    drafts={"lm": ("lm", 3, ("kl", "tv", "lk_lambda")), "medusa": ("medusa", 1, ("kl", "tv"))},
)
CONFIG = ReportConfig(baseline="kl", gammas=[4, 5], confidence=0.95, resamples=300, seed=0)
Built = tuple[Results, Findings, Records]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("project")
    results = read_results(root / "results", write_results(root, WORLD))
    write_records(root, WORLD)
    timings = {path.stem: read_json(path) for path in sorted((root / "timings").iterdir())}
    records = Records(
        target=read_json(root / "target/target.json"),
        cache=read_json(root / "cache-report/report.json"),
        timings=timings,
        traces={
            key: read_json(path)["traces"]
            for key in ("lm-kl-0", "lm-tv-0")
            for path in [root / f"results/lm-0/arms/{key.split('-')[1]}.traces.json"]
        },
        curves={("lm", "kl"): [{"step": 1.0, "alpha": 0.5, "heldout_alpha": None}]},
        params={"report": CONFIG.model_dump()},
        losses=LOSSES,
    )
    return results, find(results, CONFIG), records


@pytest.fixture(scope="module")
def report(built: Built) -> Report:
    results, found, records = built
    return build(results, found, CONFIG, records=records)


class Outline(HTMLParser):
    """Checks that tags close in order, and keeps what accessibility asks of them."""

    VOID = ("meta", "br", "link", "circle", "path", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if (href := found.get("href")) and href.startswith("#"):
            self.targets.append(href[1:])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def outline(report: Report) -> Outline:
    parsed = Outline()
    parsed.feed(report.files["index.html"])
    return parsed


def test_page_is_well_formed_and_its_links_lead_somewhere(outline: Outline) -> None:
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.targets) <= set(outline.ids)
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert set(outline.headings[1:]) == {2, 3}
    assert all(b - a <= 1 for a, b in pairwise(outline.headings))


def test_page_asks_no_network_and_runs_no_script(report: Report, outline: Outline) -> None:
    page = report.files["index.html"]
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in outline.tags}


def test_page_is_readable_without_sight_of_colours(outline: Outline) -> None:
    html = next(attrs for tag, attrs in outline.tags if tag == "html")
    assert html["lang"] == "en"
    charts = [attrs for tag, attrs in outline.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) >= 8
    assert all(attrs.get("aria-label") for attrs in charts)
    boxes = [attrs for _, attrs in outline.tags if attrs.get("class") == "scroll"]
    assert boxes
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in boxes)


def test_page_follows_the_reader(report: Report) -> None:
    page = report.files["index.html"]
    for needed in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert needed in page
    # colours are the style sheet's alone, so that dark and print can change them
    assert not re.search(r'(fill|stroke)="', page[page.index("</style>") :])


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_meets_wcag(report: Report, scheme: str) -> None:
    """Text 4.5 : 1 (AA), marks of a chart 3 : 1."""
    roots = re.findall(r":root \{(.*?)\}", report.files["index.html"], flags=re.DOTALL)
    names = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", roots[scheme == "dark"]))
    paper = luminance(names["paper"])

    def ratio(name: str) -> float:
        high, low = sorted((luminance(names[name]), paper), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert min(ratio(name) for name in ("ink", "soft", "link")) >= 4.5
    assert min(ratio(f"c{k}") for k in range(8)) >= 3
    assert min(ratio(name) for name in ("good", "bad")) >= 3


def test_same_findings_same_bytes(built: Built, report: Report) -> None:
    results, _, records = built
    again = build(results, find(results, CONFIG), CONFIG, records=records)
    assert again == report


def test_verdicts_come_first_and_carry_intervals(report: Report) -> None:
    page = report.files["index.html"]
    places = [page.index(f'id="{name}"') for name in ("verdicts", "tau", "differences", "cache")]
    assert places == sorted(places)
    assert re.search(r'<span class="interval">\[\d+\.\d, \d+\.\d\]</span> longer than kl', page)
    bare = re.sub(r'<span class="interval">.*?</span>', "", page[page.index("<body>") :])
    assert not re.search(r">[^<]*\[[+−\d][^\]<]*, [^\]<]*\][^<]*<", bare)


def test_too_few_seeds_is_said(report: Report) -> None:
    page = report.files["index.html"]
    assert "The interval over seeds is withheld for medusa: fewer than 3 seeds" in page
    assert "withheld, 1 of 3 seeds" in report.files["differences.md"]


def test_a_loss_for_lk_would_be_said_as_plainly(built: Built) -> None:
    """The baseline turned round: every verdict turns with it."""
    results, _, records = built
    turned = CONFIG.model_copy(update={"baseline": "tv"})
    page = build(results, find(results, turned), turned, records=records).files["index.html"]
    assert "shorter than tv" in page
    assert "0 of 2 comparisons come out longer than tv at T\N{NO-BREAK SPACE}=" in page


def test_sharpening_is_said(report: Report) -> None:
    assert "a temperature of 0.6 is folded into its final norm" in report.files["index.html"]


def test_predicted_against_measured_is_judged(report: Report) -> None:
    page = report.files["index.html"].replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(r"At T = 1 predicted and measured τ (do not )?agree: the largest \|z\|", page)
    assert "At T = 0 the numbers of rounds are equal on all 75 texts (5 arms)." in page


def test_without_decoding_the_page_says_so(built: Built) -> None:
    results, found, records = built
    bare = replace(found, predictions=[], z_points={}, blocks=[])
    page = build(results, bare, CONFIG, records=records).files["index.html"]
    assert "No arm was decoded" in page


def test_baseline_that_no_arm_has_compares_nothing(built: Built) -> None:
    results, _, records = built
    odd = CONFIG.model_copy(update={"baseline": "jsd"})
    made = build(results, find(results, odd), odd, records=records)
    assert "nothing to compare" in made.files["index.html"]
    assert made.metrics["lm"]["kl"]["T1"].keys() == {"tau"}


def test_gammas_beyond_every_draft_fall_back_to_the_deepest(built: Built) -> None:
    results, _, records = built
    deep = CONFIG.model_copy(update={"gammas": [9]})
    made = build(results, find(results, deep), deep, records=records)
    assert "τ at γ = 5" in made.files["tau.md"]


def test_records_that_are_missing_leave_their_section_empty(built: Built) -> None:
    results, found, _ = built
    page = build(results, found, CONFIG, records=Records({}, {})).files["index.html"]
    assert "No times were recorded" in page
    assert "says nothing of rate or coverage" in page


def test_a_traced_decoding_shows_every_pass_and_why(report: Report) -> None:
    page = report.files["index.html"]
    tokens = page[page.index('id="tokens"') : page.index('id="cache"')]
    assert tokens.count('<details class="decoding">') == 2
    assert (
        "lm-kl-0 at T\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}1: 4 tokens in 2 passes, 2.00 each"
        in tokens
    )
    assert "refused: p 0.250, q 0.500, u 0.750 ≥ p/q 0.500; α 0.600" in tokens
    assert "kept: p 0.250, q 0.500, u 0.125 &lt; p/q 0.500; α 0.600" in tokens
    assert "after a refusal; p 0.250, q 0.500" in tokens
    assert "target’s own, bonus; p &lt; 0.001" in tokens
    assert '<span class="chip refused" tabindex="0"' in tokens
    # text of a target is data: markup in it is shown, line ends are seen
    assert "&lt;b&gt;" in tokens
    assert "<b>" not in tokens
    assert "a⏎" in tokens


def test_the_best_gamma_weighs_draft_and_target_steps(report: Report) -> None:
    """τ·c / (γ·c_draft + c_verify), c_verify linear in the tokens fed, by hand for lm · kl."""
    rows = list(csv.DictReader(io.StringIO(report.files["tau.csv"])))
    taus = {
        int(r["gamma"]): float(r["tau"])
        for r in rows
        if (r["draft"], r["objective"], r["temperature"], r["domain"]) == ("lm", "kl", "1", "all")
    }
    gains = {g: tau * 20 / (g * 1 + 20 + 4 * g / 4) for g, tau in taus.items()}
    found = next(
        r
        for r in csv.DictReader(io.StringIO(report.files["speedup.csv"]))
        if (r["draft"], r["objective"]) == ("lm", "kl")
    )
    best = max(gains, key=lambda g: gains[g])
    assert int(found["best_gamma"]) == best
    assert float(found["speedup"]) == pytest.approx(gains[best], rel=1e-4)
    assert float(found["speedup_decoded"]) == pytest.approx(gains[4], rel=1e-4)


@pytest.mark.parametrize("name", ["speed", "speedup"])
def test_where_speed_is_shown_it_says_that_only_the_expectation_takes_full_batches(
    report: Report, name: str
) -> None:
    caption = report.files[f"{name}.md"].splitlines()[0]
    assert "full batches throughout" in caption
    assert re.search(r"ends? with (its|their) slowest row", caption)


def test_acceptance_is_shown_by_entropy_and_place(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(report.files["entropy.csv"])))
    assert {r["where"] for r in rows} == {"0 to 0.5", "0.5 and more"}
    assert {r["temperature"] for r in rows} == {"1"}
    places = list(csv.DictReader(io.StringIO(report.files["position.csv"])))
    assert {r["where"] for r in places} == {"1 to 7", "8 to 31"}
    seeds = next(r for r in rows if (r["draft"], r["objective"], r["depth"]) == ("lm", "kl", "0"))
    assert int(seeds["anchors"]) == 300  # three seeds pooled


def test_the_cache_section_argues_what_is_kept(report: Report) -> None:
    page = report.files["index.html"]
    section = page[page.index('id="cache"') : page.index('id="cost"')]
    assert section.count('<svg class="chart"') == 2
    assert "argued in docs/defaults.md" in section
    split = {
        "bytes_per_token": {"topk_ids": 34.25, "kept": 0.75, "tokens": 9},
        "mean_tail_mass": 0.01,
    }
    words = rate_exhibit({"splits": {"train": split}}).words
    assert words == (
        "The law of a token takes 35.0 bytes in this run's train cache (topk_ids 34.2, kept 0.8) "
        "and leaves 1.00% of the mass out."
    )
    dense = {"bytes_per_token": {"logits": 600.0, "topk_ids": 0.1}, "mean_tail_mass": 0.0}
    assert "(logits 600.0) and keeps the whole law" in rate_exhibit({"splits": {"t": dense}}).words
    assert rate_exhibit({}).words == ""


def test_metrics_are_nested_by_draft_objective_and_temperature(report: Report) -> None:
    leaf = report.metrics["lm"]["lk_lambda"]["T1"]
    assert leaf["difference_percent_lo"] <= leaf["difference_percent"]
    assert leaf["difference_percent"] <= leaf["difference_percent_hi"]
    assert leaf["seeds"] == 3
    assert report.metrics["lm"]["kl"]["T1"].keys() == {"tau"}


def test_page_csv_and_metric_tell_the_same_number(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(report.files["differences.csv"])))
    row = next(
        r
        for r in rows
        if (r["draft"], r["objective"], r["temperature"], r["gamma"], r["domain"])
        == ("lm", "lk_lambda", "1", "4", "all")
    )
    leaf = report.metrics["lm"]["lk_lambda"]["T1"]
    assert float(row["difference_percent"]) == pytest.approx(leaf["difference_percent"], rel=1e-3)
    assert float(row["over_seeds_percent_lo"]) == pytest.approx(
        leaf["difference_percent_lo"], rel=1e-3
    )
    shown = f"{float(row['difference_percent']):+.2f}"
    assert shown in report.files["differences.md"]
    assert shown in report.files["index.html"]


def test_tau_table_has_the_columns_of_the_paper(report: Report) -> None:
    """T = 0 before T = 1, each with its sets, their plain mean, and the pooled figure."""
    header = report.files["tau.md"].splitlines()[2]
    sets = ("code", "maths", "prose", "mean", "all")
    wanted = [f"T = {t} {name}" for t in (0, 1) for name in sets]
    assert [cell.strip() for cell in header.strip("| ").split("|")] == [
        "draft",
        "objective",
        *wanted,
    ]
    row = report.files["tau.md"].splitlines()[4].replace("*", "").strip("| ").split("|")
    taus = [float(cell.split()[0]) for cell in row[2:6]]
    assert taus[3] == pytest.approx(sum(taus[:3]) / 3, abs=0.011)


def test_gains_stand_beside_the_paper_s_of_the_same_loss(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(report.files["paper.csv"])))
    found = {(r["draft"], r["objective"]): r for r in rows}
    assert float(found["medusa", "kl"]["T1 tau"]) > 1
    assert found["medusa", "kl"]["T1 paper_percent"] == ""
    assert found["medusa", "tv"]["T1 paper_percent"] == ""  # the paper trains no such arm
    assert float(found["lm", "lk_lambda"]["T1 paper_percent"]) == pytest.approx(3.8, abs=0.1)
    own = report.metrics["lm"]["lk_lambda"]["T1"]
    assert float(found["lm", "lk_lambda"]["T1 percent"]) == pytest.approx(
        own["difference_percent"], rel=1e-3
    )
    assert float(found["lm", "lk_lambda"]["T1 percent_lo"]) == pytest.approx(
        own["difference_percent_lo"], rel=1e-3
    )
    assert "lk_lambda: lk_lambda, eta 3.0" in report.files["index.html"]


def test_gains_against_another_loss_than_kl_stand_beside_nothing(built: Built) -> None:
    results, _, records = built
    turned = CONFIG.model_copy(update={"baseline": "tv"})
    made = build(results, find(results, turned), turned, records=records)
    assert "paper.md" not in made.files
    assert 'id="paper"' not in made.files["index.html"]


def test_csv_of_tau_has_every_gamma_and_domain(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(report.files["tau.csv"])))
    lm = [r for r in rows if r["draft"] == "lm" and r["domain"] == "all"]
    assert {r["gamma"] for r in lm} == {"1", "2", "3", "4", "5"}
    assert {r["domain"] for r in rows} == {"all", "code", "maths", "prose"}
    assert all(float(r["tau_lo"]) <= float(r["tau"]) <= float(r["tau_hi"]) for r in rows)


TABLE = Table(
    "A < B",
    [
        Column("a", "a", merge=True),
        Column("b", "b", merge=True),
        Column("x", "x|y", signed=True),
        Column("i", "i", group="g", digits=1),
    ],
    [
        {"a": "p&q", "b": "1", "x": -1.234, "i": Interval(1.0, 0.5, 1.5)},
        {"a": "p&q", "b": "1", "x": 0.001, "i": None},
        {"a": "r", "b": "1", "x": float("nan"), "i": "withheld"},
    ],
    strong=frozenset({(0, "i")}),
)


def test_csv_keeps_numbers_numbers() -> None:
    assert to_csv(TABLE).splitlines() == [
        "a,b,x,i,i_lo,i_hi",
        "p&q,1,-1.234,1,0.5,1.5",
        "p&q,1,0.001,,,",
        "r,1,,,,",
    ]


def test_markdown_escapes_and_rounds() -> None:
    lines = to_markdown(TABLE).splitlines()
    assert lines[2] == "| a | b | x\\|y | g i |"
    assert lines[4] == "| p&q | 1 | −1.23 | **1.0 [0.5, 1.5]** |"
    assert lines[5] == "| p&q | 1 | 0.00 | – |"
    assert lines[6] == "| r | 1 | – | withheld |"


def test_html_merges_within_the_columns_left_of_it_and_escapes() -> None:
    page = to_html(TABLE)
    assert '<th scope="rowgroup" rowspan="2">p&amp;q</th>' in page
    # "1" goes on into the third row, whose draft is another: it starts anew
    assert page.count('<th scope="rowgroup" rowspan="1">1</th>') == 1
    assert "A &lt; B" in page
    assert '<span class="interval">[0.5, 1.5]</span>' in page


def test_brackets_that_are_no_interval_stay_text() -> None:
    assert with_intervals("a[b] [x, y] [1, 2]") == (
        'a[b] [x, y] <span class="interval">[1, 2]</span>'
    )


@pytest.mark.parametrize(
    "change",
    [{"gammas": []}, {"gammas": [0]}, {"confidence": 1.0}, {"resamples": 10}, {"seed": -1}],
)
def test_configuration_has_bounds(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ReportConfig.model_validate(CONFIG.model_dump() | change)


def test_templates_lie_beside_the_module() -> None:
    assert {p.name for p in Path("pipeline/templates").iterdir()} == {
        "rate.json",
        "report.css",
        "report.html",
    }


def test_one_arm_and_one_text_are_in_the_singular() -> None:
    one: Any = SimpleNamespace(
        z_points={0.0: 0.0},
        predictions=[
            SimpleNamespace(temperature=0.0, agreement=SimpleNamespace(unequal=0, prompts=1))
        ],
    )
    assert agreement_words(one) == [
        "At T = 0 the numbers of rounds are equal on the one text (1 arm)."
    ]
    one.predictions[0].agreement = SimpleNamespace(unequal=1, prompts=1)
    assert agreement_words(one) == ["At T = 0 the numbers of rounds differ on 1 of 1 text (1 arm)."]
