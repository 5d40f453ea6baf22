"""The HTML report: what it holds, and how it behaves in a real browser."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from optimum_rmtkd import RMTKDConfig, RMTKDError, analyze
from optimum_rmtkd.hub import Run, report_page, spectra_page, write_results, write_spectra
from optimum_rmtkd.pages.figures import PALETTE, bulk_law, draw_spectrum, new_figure
from optimum_rmtkd.pages.rounding import counted, duration, rounded, signed, size
from optimum_rmtkd.pages.widths import width_map
from optimum_rmtkd.spectra import marchenko_pastur as mp
from optimum_rmtkd.trainer import Stage
from optimum_rmtkd.trainer.stages import write_journal

from ..surgery import zoo
from .browser import browser, open_page  # noqa: F401


pytest.importorskip("matplotlib")

RECIPE = RMTKDConfig(target_reduction=0.4, round_to=4, min_width=4, importance="variance")


@pytest.fixture(scope="module")
def spectra():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    return analyze(model, data, RECIPE, progress=False)


@pytest.fixture(scope="module")
def run_folder(spectra, tmp_path_factory):
    """The record of a run of two stages."""
    folder = tmp_path_factory.mktemp("run")
    sites = [
        {"name": s.name, "kind": s.kind, "width_before": s.width, "width_after": s.planned} for s in spectra.sites
    ]
    numbers = {"metric_name": "eval_accuracy", "metric_before": 0.9, "metric_cut": 0.7, "metric_after": 0.88}
    measured = {f"metrics_{m}": {"eval_f1": v} for m, v in (("before", 0.91), ("cut", 0.52), ("after", 0.83))}
    stages = [
        Stage(0, 0, tuple(sites), 1000, 700, status="accepted", **numbers, **measured, note="a <note>"),
        Stage(1, 5, tuple(sites), 700, 600, status="rolled_back", reason="<b>fell</b>", **numbers),
    ]
    write_journal(folder, stages, RECIPE, 1000, 700, fit={"steps": 12, "share": 0.4, "why": "its head is new"})
    for stage in stages:
        write_spectra(folder, stage.index, spectra)
    log = [{"step": i, "loss": 1 / i, "loss/kl": 0.5 / i} for i in range(1, 9)] + [{"step": 8, "eval_loss": 0.3}]
    metric = {"name": "accuracy", "before": 0.9, "after": 0.88}
    write_results(folder, log_history=log, base_model="org/base", recipe=RECIPE.to_dict(), metric=metric)
    return folder


@pytest.fixture(scope="module")
def page_file(run_folder):
    html = report_page(Run.read(run_folder))
    (run_folder / "report.html").write_text(html, encoding="utf8")
    return run_folder / "report.html"


def test_the_page_stands_alone(page_file):
    html = page_file.read_text(encoding="utf8")
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)["']""", html) + re.findall(r"url\(([^)]+)\)", html)
    assert not [address for address in addresses if not address.startswith(("#", "data:"))]
    assert "@import" not in html and "<script src" not in html and '<link rel="stylesheet' not in html
    assert not [name for name in PALETTE.values() if name in html]  # every colour comes from the page's own palette


def test_ids_are_unique(page_file):
    ids = re.findall(r'\bid="([^"]+)"', page_file.read_text(encoding="utf8"))
    assert len(ids) == len(set(ids))


def test_what_others_wrote_is_escaped(page_file):
    html = page_file.read_text(encoding="utf8")
    assert "<b>fell</b>" not in html and "&lt;b&gt;fell&lt;/b&gt;" in html


def test_every_metric_and_the_fine_tuning_are_shown(page_file):
    html = page_file.read_text(encoding="utf8")
    assert "Fine-tuned first: 12 steps, 40% of the training (its head is new); eval_accuracy 0.9000" in html
    assert "stage 0: a &lt;note&gt;" in html and "All metrics of the stages" in html
    rows = [re.findall(r">([^<>]+)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", html)]
    assert ["f1", "0", "0.9100", "0.5200", "0.8300"] in rows
    assert ["f1", "0.9100", "0.8300", "-0.0800"] in rows


def test_counts_in_the_record_are_exact(tmp_path):
    write_results(tmp_path, parameters=(22_713_986, 11_352_706), cost=11_352_706.0, loss=0.123456789)
    found = json.loads((tmp_path / "rmtkd_results.json").read_text())
    assert (
        found["parameters"] == [22_713_986, 11_352_706] and found["cost"] == 11_352_706 and found["loss"] == 0.1234568
    )


def test_letters_of_the_figures_can_be_read_on_a_phone(open_page, page_file):  # noqa: F811
    page, _ = open_page(page_file, 400)
    plain = "t => t.checkVisibility() && !t.children.length"  # powers of ten are made of parts
    size = "t => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)"
    sizes = page.evaluate(f"[...document.querySelectorAll('figure svg text')].filter({plain}).map({size})")
    assert len(sizes) > 30 and min(sizes) > 8.5


def tiles(html: str) -> dict[str, str]:
    """{label: value} of the tiles at the head of a page."""
    return dict(re.findall(r'<h2 id="tile-\d">(.*?)</h2>\n<p class="value">(.*?)</p>', html))


def test_the_answers_come_first(page_file, run_folder):
    html = page_file.read_text(encoding="utf8")
    assert tiles(html) == {"Size": "30.0 % smaller", "Speed": "not measured", "Accuracy": "−2.00 points"}
    assert f"optimum-cli rmtkd bench {run_folder.name} --against org/base" in html
    order = ["tile-3", "Width map", "Budget", "Stages", "All metrics of the stages", "Eigenvalues site by site"]
    places = [re.search(rf'<h2 id="(tile-\d">|[^"]*">[^<]*)?{name}', html).start() for name in order[1:]]
    assert places == sorted(places) and html.index(order[0]) < places[0]


@pytest.mark.parametrize("hostile", [{"what": "batch 1"}, {"what": "latency, batch 1", "before": 0}, {}])
def test_the_speed_is_that_of_the_smallest_batch(hostile):
    values = [
        {"what": "throughput, batch 32, length 8", "unit": "/s", "before": 10.0, "after": 41.0, "ratio": 4.1},
        {"what": "latency, batch 1, length 8", "unit": "s", "before": 0.03, "after": 0.0125, "ratio": 2.4},
        {"what": "prefill, batch 1, length 8", "unit": "tokens/s", "before": 1.0, "after": 9.0, "ratio": 9.0},
        hostile,
    ]
    html = report_page(Run("small", bench={"setting": "cpu, 2 threads; torch", "rows": [], "values": values}))
    assert tiles(html)["Speed"] == "2.4× as fast"
    assert "30 ms" in html and "12.5 ms" in html and "4.1× as fast at batch 32, length 8" in html


def test_metrics_are_shown_as_people_read_them():
    shown = []
    for name, before, after in (("f1", 88.5, 87.25), ("pearson", 0.9, 0.85), ("perplexity", 20.0, 21.5)):
        run = Run("small", results={"metric": {"name": name, "before": before, "after": after}})
        shown.append(list(tiles(report_page(run)).items())[-1])
    assert shown == [("F1", "−1.25 points"), ("Pearson", "−0.050"), ("Perplexity", "+1.500")]
    run = Run("small", metrics={"before": {"eval_loss": 0.5, "eval_x": 1}, "after": {"eval_loss": 0.625}})
    assert tiles(report_page(run))["Loss"] == "+0.125"


def test_numbers_are_rounded_for_people():
    assert [counted(n) for n in (999, 238_650, 999_999, 22_713_986)] == ["999", "239 k", "1 M", "22.7 M"]
    assert [size(4_788_056), duration(0.01159)] == ["4.79 MB", "11.6 ms"]
    assert [signed(-0.6), signed(-0.001)] == ["−0.60", "±0.00"]
    numbers = (4096.0, 0.9716, 1.855e-7, -12.345, float("nan"))
    assert [rounded(n) for n in numbers] == ["4,096", "0.9716", "1.9 × 10⁻⁷", "−12.35", "–"]


def test_the_map_has_a_row_a_block_and_a_column_a_kind():
    kinds = ("attention_qk", "attention_vo", "intermediate")
    sites = [("hidden", 64, 32), *((f"layer.{i}.{kind}", 64, 16 * (i + 1)) for i in range(2) for kind in kinds)]
    found = width_map(sites)
    assert found["columns"] == list(kinds)
    assert [row["title"] for row in found["rows"]] == ["hidden", "layer 0", "layer 1"]
    assert [len(row["cells"]) for row in found["rows"]] == [1, 3, 3]
    assert [cell["share"] for cell in found["rows"][2]["cells"]] == [0.5] * 3
    holed = width_map([site for site in sites if site[0] != "layer.0.attention_vo"])
    assert holed["rows"][1]["cells"][1] is None or holed["columns"] == ["attention_qk", "intermediate", "attention_vo"]
    assert width_map([("@.a.0.q", 8, 4), ("@.a.1.k", 8, 4), ("@.b.2.v", 8, 4)])["columns"] == []
    assert width_map([("x", 0, 4)])["rows"][0]["cells"][0]["share"] == 0


def test_a_law_far_narrower_than_the_bulk_stays_inside_the_axes():
    """With many samples for each channel the law is a line; real spectra are not."""
    values = [10.0 ** (3 - 6 * i / 199) for i in range(200)]
    axes = new_figure().subplots()
    draw_spectrum({"eigenvalues": values, "spectral_rank": 5, "n_eff": 200_000, "edge": 1e2}, axes)
    bars = max(bar.get_height() + bar.get_y() for bar in axes.patches)
    law = max(max(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) > 2)
    assert law > 3 * bars and law < axes.get_ylim()[1] and axes.get_ylim()[0] == 0
    heights = axes.transAxes.inverted().transform(axes.transData.transform([(1.0, bars), (1.0, law)]))[:, 1]
    assert heights[0] > 0.1 and heights[1] < 1  # both can be read


def test_names_of_sites_cannot_leave_their_attribute(spectra):
    report = spectra.to_dict()
    report["sites"] = [report["sites"][0] | {"name": '"><script>alert(1)</script>'}]
    html = spectra_page(report)
    assert "<script>alert" not in html and 'aria-label="Eigenvalues of &quot;&gt;&lt;script&gt;' in html


def test_every_site_and_estimator_is_there(page_file, spectra):
    html = page_file.read_text(encoding="utf8")
    for site in spectra.sites:
        assert html.count(f"Eigenvalues of {site.name}:") == 2  # one for each stage
    for name in ("rank: screenot", "rank: mp_quantile", "rank: gavish_donoho"):
        assert name in html


def test_spectral_report_writes_the_page(spectra, tmp_path):
    html = spectra.to_html(tmp_path / "spectra.html")
    assert (tmp_path / "spectra.html").read_text(encoding="utf8") == html
    assert list(tiles(html)) == ["Planned size", "Predicted price", "Signal"]
    assert ">Budget<" in html and ">Stages<" not in html


def test_the_fitted_law_recovers_the_noise():
    """Eigenvalues of white noise of variance 2.5 under two strong directions."""
    generator = torch.Generator().manual_seed(0)
    n, d = 4000, 200
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * math.sqrt(2.5)
    x[:, :2] *= 10
    values = torch.linalg.eigvalsh(x.T @ x / n).flip(0)
    site = {"eigenvalues": values.tolist(), "null_directions": 0, "spectral_rank": 2, "n_eff": n}
    fit = bulk_law(site)
    bulk, q = fit.eigenvalues, fit.law.q
    assert len(bulk) == d - 2 and q == pytest.approx((d - 2) / n)
    assert fit.sigma2 == pytest.approx(2.5, rel=0.02)
    low, high = mp.edges(q, fit.sigma2)
    assert low * 0.97 < bulk[0] and bulk[-1] < high * 1.03


def test_a_law_needs_a_bulk():
    assert bulk_law({"eigenvalues": [3.0, 1.0], "null_directions": 0, "spectral_rank": 1, "n_eff": 10}) is None


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(RMTKDError, match="no such folder"):
        Run.read(tmp_path / "nothing")
    with pytest.raises(RMTKDError, match="no record of a reduction"):
        Run.read(tmp_path)
    (tmp_path / "rmtkd_stages.json").write_text('{"stages": [')
    with pytest.raises(RMTKDError, match="is not JSON"):
        Run.read(tmp_path)


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("stages", ("stages",), {"index": 0}, "stages={'index': 0}): expected a list; got a dict"),
        ("stages", ("stages", 0), "x", "stages[0]='x'"),
        ("stages", ("stages", 0, "metric_after"), "0.9", "rmtkd_stages.json: stages[0](metric_after='0.9'): expected"),
        ("stages", ("stages", 0, "metrics_after", "eval_f1"), [1], "metrics_after['eval_f1']=[1]"),
        (
            "stages",
            ("stages", 1, "parameters_after"),
            None,
            "stages[1](parameters_after=None): expected a whole",
        ),
        ("stages", ("stages", 1, "sites", 0, "width_after"), "8", "stages[1].sites[0](width_after='8')"),
        ("stages", ("fit", "steps"), "many", "fit(steps='many')"),
        ("spectra", ("stages", "first"), {}, "stages['first']: expected the number of a stage"),
        (
            "spectra",
            ("stages", "0"),
            {"sites": []},
            "stages['0'] lacks parameters, planned_parameters, recipe",
        ),
        ("spectra", ("stages", "0", "sites", 0, "eigenvalues"), "1", "sites[0](eigenvalues='1')"),
        ("spectra", ("stages", "0", "sites", 0, "ranks"), None, "sites[0](ranks=None): expected a mapping"),
        ("results", ("log_history",), [3], "log_history[0]=3"),
        ("results", ("metric",), {"name": "f1"}, "rmtkd_results.json: metric lacks before, after"),
        ("results", ("parameters",), ["1", 2], "parameters[0]='1'"),
    ],
)
def test_what_no_run_writes_is_named(run_folder, tmp_path, file, path, value, message):
    for source in run_folder.glob("rmtkd_*.json"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    place = tmp_path / f"rmtkd_{file}.json"
    values = inner = json.loads(place.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    place.write_text(json.dumps(values))
    with pytest.raises(RMTKDError) as error:
        Run.read(tmp_path)
    assert message in str(error.value) and str(place) in str(error.value)


def test_a_repeated_stage_replaces_the_later_ones(spectra, tmp_path):
    for index in (0, 1, 2, 1):
        write_spectra(tmp_path, index, spectra)
    assert list(Run.read(tmp_path).spectra) == [0, 1]
    stored = Run.read(tmp_path).spectra[0]["sites"][0]["eigenvalues"]
    assert stored == pytest.approx(spectra.sites[0].subspace.eigenvalues.tolist(), rel=1e-6)


# In a browser


@pytest.mark.parametrize("width, scheme", [(400, "light"), (1400, "dark")])
def test_one_column_on_a_phone_and_the_width_of_a_desktop(open_page, page_file, width, scheme):  # noqa: F811
    page, _ = open_page(page_file, width, scheme)
    places = "[...document.querySelectorAll('.tile, main > section')].map(e => e.getBoundingClientRect())"
    found = page.evaluate(f"{places}.map(r => [r.left, r.right])")
    assert min(left for left, _ in found) < 0.05 * width and max(right for _, right in found) > 0.95 * width
    assert (len({round(left) for left, _ in found}) == 1) == (width == 400)
    clipped = page.evaluate("""[...document.querySelectorAll("svg")].flatMap(svg => {
        const box = svg.getBoundingClientRect();
        const out = r => r.left < box.left - 2 || r.right > box.right + 2 || r.bottom > box.bottom + 2;
        const texts = [...svg.querySelectorAll("text")];
        return texts.filter(t => out(t.getBoundingClientRect())).map(t => t.textContent);
    })""")
    assert clipped == []


@pytest.mark.parametrize("width, scheme", [(400, "dark"), (1400, "light")])
def test_page_in_a_browser(open_page, page_file, width, scheme, tmp_path):  # noqa: F811
    page, complaints = open_page(page_file, width, scheme)
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll, the page does not
    drawn = "[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility())"
    heights = page.evaluate(f"{drawn}.map(s => s.getBoundingClientRect().height)")
    assert len(heights) >= 6 and min(heights) > 100
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == (scheme == "dark") and abs(bright[0] - bright[1]) > 450
    shot = tmp_path / "page.png"
    page.screenshot(path=str(shot), full_page=True)
    assert shot.stat().st_size > 20_000


def column(page, table: str, number: int) -> list[str]:
    return page.evaluate(
        f"[...document.querySelector('[aria-label^=\"{table}\"] tbody').rows].map(r => r.cells[{number}].dataset.key)"
    )


def test_tables_sort_by_mouse_and_keyboard(open_page, page_file):  # noqa: F811
    page, complaints = open_page(page_file)
    name = "Stage 0: Spectra"
    button = page.locator(f'[aria-label^="{name}"] thead button', has_text="ks_distance")
    place = page.locator(f'[aria-label^="{name}"] thead button').all_inner_texts().index("ks_distance")
    before = column(page, name, place)
    button.click()
    upwards = column(page, name, place)
    assert sorted(before) == sorted(upwards) != before
    numbers = [float(value) for value in upwards if value]
    assert numbers == sorted(numbers) and upwards[: len(numbers)] == [v for v in upwards if v]
    button.focus()
    page.keyboard.press("Enter")
    downwards = [float(value) for value in column(page, name, place) if value]
    assert downwards == numbers[::-1]
    head = page.locator(f'[aria-label^="{name}"] thead th').nth(place)
    assert head.get_attribute("aria-sort") == "descending"
    assert complaints == []


def test_everything_can_be_reached_by_keyboard(open_page, page_file):  # noqa: F811
    page, _ = open_page(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    reachable = "[...document.querySelectorAll('th button, summary, .scroll, nav a')].every(e => e.tabIndex >= 0)"
    assert page.evaluate(reachable)
    site = page.locator(".sites details").nth(1)
    assert site.evaluate("d => d.open")
    site.locator("summary").focus()
    page.keyboard.press("Enter")
    assert not site.evaluate("d => d.open")


def test_json_of_the_record_is_strict(run_folder):
    files, loose = sorted(run_folder.glob("rmtkd_*.json")), []
    for path in files:
        json.loads(
            path.read_text(encoding="utf8"), parse_constant=lambda name, path=path: loose.append((path.name, name))
        )
    assert files and not loose  # NaN, Infinity
