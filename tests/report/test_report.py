"""The report says what the files say, opens offline, and draws every figure."""

import base64
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from simulated import Archive, write_finetuning, write_tiles_and_embeddings

from histossl import cli
from histossl.core.config import commands_with, note_command, noted_commands
from histossl.core.workspace import Workspace
from histossl.report.content import pretraining_log, read_content
from histossl.report.features import look_at_features
from histossl.report.html import key_figures, render, sections, simulated, write_report
from histossl.stats.verdict import Saved, measure, read_predictions, summarise, verdict, write_predictions

FIGURES = {
    "figure-curve", "figure-curve-balanced_accuracy", "figure-curve-log_loss", "figure-saved", "figure-confusion",
    "figure-roc", "figure-calibration", "figure-pretraining", "figure-features", "figure-neighbours",
}  # fmt: skip


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("report") / "ws")
    run = write_finetuning(workspace, "colon")
    write_tiles_and_embeddings(workspace, run)
    write_report(run, workspace)
    return run, workspace


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.links, self.ids, self.styles = [], [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.links.append(value)
            if name == "id":
                assert value not in self.ids, f"id {value} twice on the page"
                self.ids.add(value)
            if name.startswith("on"):
                raise AssertionError(f"a handler: {name}={value}")

    def handle_data(self, data):
        self.text.append(data)


def page_of(run):
    return Page(run.report.read_text(encoding="utf-8"))


def words(page):
    return re.sub(r"\s+", " ", " ".join(page.text))


def test_report_opens_offline(reported):
    """Nothing on the page points anywhere but into the page itself."""
    page = page_of(reported[0])
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith(("#", "data:image/")) for link in page.links), page.links
    text = reported[0].report.read_text(encoding="utf-8")
    assert "@import" not in text
    assert not re.search(r"url\((?!#|data:)", text)


def test_every_reference_inside_the_page_leads_somewhere(reported):
    page = page_of(reported[0])
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    text = reported[0].report.read_text(encoding="utf-8")
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= page.ids


def test_report_shows_the_numbers_of_the_files(reported):
    run, _ = reported
    predictions, classes = read_predictions(run.predictions)
    shown = words(page_of(run))
    for row in summarise(measure(predictions, classes)):
        if row.metric == "auroc":
            assert f"{row.mean:.3f} {row.low:.3f}–{row.high:.3f}" in shown, row  # noqa: RUF001
    assert "Adaptation helped" in shown
    assert "broken.svs not used not a slide file" in shown
    assert "histossl report --name colon" in shown
    assert "histossl finetune --labels labels.csv" in shown


def test_report_is_the_same_twice(reported):
    run, workspace = reported
    before = run.report.read_bytes(), run.curve_svg.read_bytes(), run.curve_png.read_bytes()
    write_report(run, workspace)
    assert before == (run.report.read_bytes(), run.curve_svg.read_bytes(), run.curve_png.read_bytes())


def test_names_are_escaped(tmp_path):
    """Classes, files and reasons come from outside; none becomes markup, in text, attributes or figures."""
    nasty = ('<script>alert("x")</script>', "a&b$x_1^{$", "carcinoma \"in situ\" 'T1'")
    workspace = Workspace(tmp_path)
    run = write_finetuning(workspace, "n", classes=nasty, site_statement="<b>site</b> & label")
    (tmp_path / "archive.csv").write_text(
        "file,status,reason\n<img src=x onerror=alert(1)>.svs,unreadable,<i>why</i>\n"
    )
    write_report(run, workspace)
    page = page_of(run)
    assert not {"script", "img", "b", "i"} & set(page.tags)
    shown = words(page)
    for name in nasty:
        assert re.sub(r"\s+", " ", name) in shown
    assert "<i>why</i>" in shown
    text = run.report.read_text(encoding="utf-8")
    assert html.escape(nasty[0], quote=False) in text


def test_sections_without_data_are_left_out(tmp_path):
    """No pretraining log, no ledger, no adapted start: the page says what a reader would miss, and nothing breaks."""
    workspace = Workspace(tmp_path)
    archive = Archive(patients_per_class=4, separation={"random": 1.0}, budgets=(1, 2), num_draws=2, num_folds=2)
    run = write_finetuning(workspace, "bare", archive)
    shutil.rmtree(tmp_path / "pretrain")
    (tmp_path / "archive.csv").unlink()
    run.run_json.unlink()
    write_report(run, workspace)
    page = page_of(run)
    assert "No adapted start was measured" in words(page)
    assert not {"figure-saved", "figure-pretraining", "ledger"} & page.ids
    assert "figure-curve" in page.ids


def test_every_pretraining_seed_and_every_adapted_start_is_shown(tmp_path):
    workspace = Workspace(tmp_path)
    archive = Archive(
        patients_per_class=6, separation={"imagenet": 1.0, "adapted": 2.0, "dino": 1.5},
        seeds={"adapted": 3, "dino": 2},
        seed_spread=0.1, budgets=(1, 2, "all"), num_draws=2, num_folds=2,
    )  # fmt: skip
    run = write_finetuning(workspace, "pooled", archive)
    write_report(run, workspace)
    page = page_of(run)
    shown = words(page)
    assert "adapted is the mean of 3 pretraining runs" in shown
    assert "The adapted start is the mean of 3 pretraining seeds (s0, s1 and s2)" in shown
    assert "dino: " in shown  # its own headline
    assert {"figure-saved", "figure-saved-1"} <= page.ids
    assert run.report.read_text(encoding="utf-8").count('<td class="name">s0</td>') == 2


def test_without_a_verdict_nothing_on_the_page_reads_like_one(tmp_path):
    """A class with one tested patient: no p, nothing in bold, no size "that would show", and why intervals say less."""
    workspace = Workspace(tmp_path)
    archive = Archive(
        patients_per_class=8, separation={"imagenet": 0.6, "adapted": 3.0}, budgets=(1, 2, 4), num_draws=3,
        num_folds=0, test_patients_per_class=5,
    )  # fmt: skip
    run = write_finetuning(workspace, "few", archive)
    predictions, classes = read_predictions(run.predictions)
    only = {one.patient for one in predictions if one.label == "carcinoma"}
    kept = [one for one in predictions if one.label != "carcinoma" or one.patient == min(only)]
    write_predictions(run.predictions, kept, classes)
    write_report(run, workspace)
    shown = words(page_of(run))
    text = run.report.read_text(encoding="utf-8")
    assert "Too few patients" in shown
    assert "too few patients for a p" in shown
    assert 'class="n clear"' not in text
    assert "\N{MULTIPLICATION SIGN}" not in shown
    assert "smallest difference that would show" not in shown
    assert "leaves out how class carcinoma would score with another patient" in shown


def test_a_perfect_score_of_a_few_patients_says_why_it_is_not_clear_of_guessing(tmp_path):
    """Two tested patients in one class and one in each other, all right: the interval is wide, and by how much."""
    workspace = Workspace(tmp_path)
    archive = Archive(
        separation={"imagenet": 9.0, "adapted": 9.0}, budgets=(2, 4), num_draws=3, num_folds=0,
        test_patients_per_class=2,
    )  # fmt: skip
    run = write_finetuning(workspace, "perfect", archive)
    predictions, classes = read_predictions(run.predictions)
    seconds = {max(one.patient for one in predictions if one.label == label) for label in archive.classes[1:]}
    write_predictions(run.predictions, [one for one in predictions if one.patient not in seconds], classes)
    write_report(run, workspace)
    shown = words(page_of(run))
    assert "not clearly better than guessing: 4 tested patients say so little of others that its score of 1.00" in shown
    assert "the interval goes 12.7 times the root of their sum to either side (Student's, degrees of freedom 1" in shown


def test_the_page_says_which_cases_were_simulated_and_whether_this_is_one(tmp_path):
    workspace = Workspace(tmp_path)
    archive = Archive(patients_per_class=6, slides_per_patient=3, budgets=(1, 6), num_draws=2, num_folds=2)
    said = " ".join(simulated(read_content(write_finetuning(workspace, "folds", archive), workspace)))
    assert "Folds with several slides per patient, as here, were simulated with 8 per patient only" in said
    fixed = replace(archive, test_patients_per_class=4)
    said = " ".join(simulated(read_content(write_finetuning(workspace, "fixed", fixed), workspace)))
    assert "one with 20 items per patient, alike or not" in said
    assert "Folds with several" not in said


def test_with_sites_left_out_the_page_counts_sites(tmp_path):
    workspace = Workspace(tmp_path)
    archive = Archive(patients_per_class=12, sites=6, budgets=(1, 4), num_draws=2, num_folds=3)
    split = {"group": "site", "num_folds": 3, "notes": []}
    run = write_finetuning(workspace, "sites", archive, split=split)
    shown = words(Page(render(read_content(run, workspace))))
    assert "36 patients at 6 sites" in shown
    assert "All of this rests on 6 tested sites with 36 patients" in shown
    assert "Test sites: 1,000 bootstrap samples of whole sites" in shown
    assert "Whole sites left out, as here, were simulated" in shown
    content = read_content(run, workspace)
    assert ("sites tested", "6", "36 patients; rarest class: 5 sites") in key_figures(content, None, [])
    assert "Too few sites to say whether adaptation helped: 6 were tested" in shown
    assert "With fewer than 8 sites the intervals are too narrow" in shown
    predictions, classes = read_predictions(run.predictions)
    write_predictions(run.predictions, [replace(one, site="") for one in predictions], classes)
    content = read_content(run, workspace)
    assert content.measured.drawn == "patient"
    assert "made before they named the site" in " ".join(simulated(content))


def test_one_draw_is_not_called_an_interval_over_draws(tmp_path):
    workspace = Workspace(tmp_path)
    archive = Archive(patients_per_class=4, budgets=(1, 2), num_draws=1, num_folds=2)
    run = write_finetuning(workspace, "one", archive)
    shown = words(Page(render(read_content(run, workspace))))
    assert "over patients only" in shown
    assert "With one draw nothing shows how much hangs on which slides were labelled" in shown
    assert "covers one source of chance" in shown
    assert "the variance between draws" not in shown


def test_the_key_figure_quotes_the_same_row_as_the_sentence(reported):
    """Where the largest budget saves nothing, "8 instead of 8" is no figure to take away."""
    content = read_content(*reported)
    found = verdict(content.measured)
    assert found.outcome == "helped"
    rows = [
        Saved(4, 4, 0.8, 3.1, 2.0, 4.0, at_most=False),
        Saved(8, 8, 0.9, 8.0, 4.0, None, at_most=False),
        Saved(16, 16, 0.95, None, 9.0, None, at_most=False),
    ]
    figure = next(one for one in key_figures(content, found, rows) if "needed" in one[0])
    assert figure[1] == "3.1 instead of 4"
    assert not any("needed" in one[0] for one in key_figures(content, found, rows[1:]))


def test_the_commands_on_the_page_are_all_there_were_and_remake_it(tmp_path, monkeypatch):
    """Tiling, pretraining, both finetunings of this name, and the page itself in the same workspace."""
    workspace = Workspace(tmp_path)
    first = ["/bin/histossl", "finetune", "--labels", "l.csv", "--workspace", "my ws", "--starts", "imagenet"]
    second = [*first[:-1], "adapted"]
    monkeypatch.setattr("sys.argv", second)
    assert commands_with({"command": first}) == [first, second]
    assert commands_with({"commands": [second, first]}) == [first, second]
    run = write_finetuning(workspace, "both", commands=[first, second])
    monkeypatch.setattr("sys.argv", ["/bin/histossl", "tile", "--slides", "archive", "-w", "my ws"])
    for _ in range(2):
        note_command(workspace.tile_commands)
    called = sections(read_content(run, workspace))["commands"]
    assert called == [
        "histossl tile --slides archive -w 'my ws'",
        "histossl pretrain",
        "histossl finetune --labels l.csv --workspace 'my ws' --starts imagenet",
        "histossl finetune --labels l.csv --workspace 'my ws' --starts adapted",
        "histossl report --name both -w 'my ws'",
    ]
    monkeypatch.setattr("sys.argv", ["/bin/histossl", "tile", "--slides", "archive"])
    monkeypatch.setenv("HISTOSSL_WORKSPACE", "/data/ws")
    note_command(tmp_path / "noted.json")
    assert noted_commands(tmp_path / "noted.json") == [
        ["/bin/histossl", "tile", "--slides", "archive", "-w", "/data/ws"]
    ]
    run = write_finetuning(workspace, "without")
    assert sections(read_content(run, workspace))["remake"] == f"histossl report --name without -w {tmp_path}"


def test_the_colour_floor_stands_beside_the_others_whatever_head_it_has(tmp_path):
    workspace = Workspace(tmp_path)
    archive = Archive(
        patients_per_class=5, separation={"colour": 0.9, "imagenet": 1.4, "adapted": 2.3}, budgets=(1, 2), num_draws=2,
        num_folds=2,
    )  # fmt: skip
    run = write_finetuning(workspace, "floor", archive)
    predictions, classes = read_predictions(run.predictions)
    write_predictions(
        run.predictions, [replace(one, head="abmil") if one.start != "colour" else one for one in predictions], classes
    )
    content = read_content(run, workspace)
    assert content.head == "abmil"
    assert content.starts == ["adapted", "imagenet", "colour"]
    found = sections(content)
    assert all(None not in row for _, row in found["scores"] + found["all_metrics"])
    assert ("adapted", "colour") in [(one.start[0], one.reference[0]) for one in found["other_comparisons"]]


def test_a_missing_pretraining_log_is_said(reported, tmp_path):
    _, workspace = reported
    copied = Workspace(shutil.copytree(workspace.root, tmp_path / "ws"))
    shutil.rmtree(copied.pretrain_root)
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    moved = copied.finetune("colon")
    facts = json.loads(moved.run_json.read_text())
    facts["starts"]["adapted"]["source"] = str(tmp_path / "none" / "backbone.safetensors")
    moved.run_json.write_text(json.dumps(facts))
    assert "log of the pretraining run is not in this workspace" in render(read_content(moved, copied))


def test_one_class_in_a_fold_or_many_classes_do_not_break_the_page(tmp_path):
    workspace = Workspace(tmp_path)
    many = tuple(f"class {number}" for number in range(24))
    archive = Archive(
        patients_per_class=2, classes=many[:12], separation={"imagenet": 1.5, "adapted": 2}, budgets=(1,), num_draws=2,
        num_folds=2,
    )  # fmt: skip
    write_report(write_finetuning(workspace, "many", archive), workspace)
    two = Archive(patients_per_class=6, classes=("no", "yes"), budgets=(1, "all"), num_draws=2, num_folds=3)
    run = write_finetuning(workspace, "two", two)
    write_report(run, workspace)
    assert "figure-roc" in page_of(run).ids


def test_log_of_a_killed_and_resumed_run_is_read(tmp_path):
    run = Workspace(tmp_path).pretrain("a")
    run.root.mkdir(parents=True)
    run.log.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 2, "lo\n{"step": 2, "loss": 2.0}\n'
    )
    steps, values = pretraining_log(run)["loss"]
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [3.0, 2.0]


def test_the_page_tells_what_pretraining_said_of_itself(reported, tmp_path):
    """A probe that fell and a monitor's warning stand on the page, and settings as the planner made them."""
    _, workspace = reported
    copied = Workspace(shutil.copytree(workspace.root, tmp_path / "ws"))
    moved = copied.finetune("colon")
    run = read_content(moved, copied).pretrain
    run.log.write_text(
        '{"step": 0, "probe": 0.6}\n{"step": 5, "warning": "features < fall together"}\n{"step": 9, "probe": 0.5}\n'
        '{"step": 9, "loss": 1.0}\n{"step": 10, "loss": 0.9}\n'
    )
    asked = {"config": {"lr": 0.0, "weight_decay": -1.0, "warmup": -1.0, "steps": 0, "method": "mocov2"}}
    plan = {"plan": {"num_steps": 10, "lr": 0.03, "weight_decay": 1e-4, "warmup_steps": 2}}
    plan["plan"]["knobs"] = {"batchnorm_group_tiles": 16}  # what was in effect
    plan["knobs"] = {"momentum": 0.99, "batchnorm_group_tiles": 32}
    run.run_json.write_text(json.dumps(asked | plan))
    told = words(Page(render(read_content(moved, copied))))
    assert "Adaptation did not help on the labelled training slides: no look of the probe" in told
    assert "Step 5: features < fall together." in told
    settings = told[told.index("Settings of this run") :]
    for one in ("lr 0.03", "weight-decay 0.0001", "warmup-steps 2", "steps 10", "knobs momentum 0.99"):
        assert one in settings
    assert "batchnorm-group-tiles 16" in settings
    assert "-1" not in settings[: settings.index("Labels, split")]


def test_command_remakes_the_page(reported, capsys):
    run, workspace = reported
    run.report.unlink()
    assert cli.main(["report", "--name", "colon", "-w", str(workspace.root)]) == 0
    assert run.report.exists()
    assert capsys.readouterr().out.strip() == str(run.report)


def test_help_names_the_extra_that_a_umap_needs(capsys):
    assert cli.main(["report", "--help"]) == 0
    assert "'histossl[umap]'" in capsys.readouterr().out


def test_command_names_the_curves_that_there_are(reported, capsys):
    _, workspace = reported
    assert cli.main(["report", "--name", "colen", "-w", str(workspace.root)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "did you mean 'colon'?" in error
    (workspace.finetune_root / "empty").mkdir(exist_ok=True)
    assert cli.main(["report", "--name", "empty", "-w", str(workspace.root)]) == 1
    (workspace.finetune_root / "empty").rmdir()


# ---- in a browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
LOOK = """
<script>
const found = {};
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg"), images = [...figure.querySelectorAll("img")];
  const box = (svg || figure).getBoundingClientRect();
  found[figure.id] = {
    width: box.width, height: box.height,
    shapes: svg ? [...svg.querySelectorAll("path, use, image, text")].filter(
      e => e.getBoundingClientRect().width > 0).length : 0,
    images: images.length, loaded: images.every(image => image.complete && image.naturalWidth > 0),
    overflow: svg ? [...svg.querySelectorAll("text")].filter(e => {
      const t = e.getBoundingClientRect(); return t.width > 0 && (t.left < box.left - 2 || t.right > box.right + 2 ||
        t.top < box.top - 2 || t.bottom > box.bottom + 2); }).map(e => e.textContent) : [],
  };
}
const page = document.documentElement;
const wide = page.scrollWidth > page.clientWidth;
const seen = btoa(unescape(encodeURIComponent(JSON.stringify({found, wide}))));
document.body.innerHTML = "<pre id=look>" + seen + "</pre>";
</script>
"""


def looked_at(report: Path, folder: Path, width: int = 1100) -> dict:
    """What a browser made of the page: a copy with a script in it measures every figure."""
    probe = folder / "probe.html"
    probe.write_text(report.read_text(encoding="utf-8").replace("</body>", LOOK + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={folder / 'chromium'}", f"--window-size={width},1400", "--dump-dom", probe.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    match = re.search(r'<pre id="look">([^<]+)</pre>', done.stdout)
    assert match, done.stderr[-2000:]
    return json.loads(base64.b64decode(match[1]))


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine to open the report in")
def test_every_figure_is_drawn_in_a_browser(reported, tmp_path):
    seen = looked_at(reported[0].report, tmp_path)
    assert set(seen["found"]) == FIGURES
    assert not seen["wide"], "the page scrolls sideways"
    assert not looked_at(reported[0].report, tmp_path, 600)["wide"], "it does on a narrow screen"
    for name, figure in seen["found"].items():
        assert figure["width"] > 200, name
        assert figure["height"] > 80, name
        assert figure["shapes"] >= 10 or figure["images"] >= 10, name
        assert figure["loaded"], name
        assert not figure["overflow"], f"{name}: text outside the figure: {figure['overflow']}"


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine to open the report in")
def test_tiles_that_decide_are_drawn_in_a_browser(reported, tmp_path):
    content = read_content(*reported)
    features = look_at_features(content, reported[1])
    row = features.panels[0].neighbours[features.starts[0]]
    shown = replace(
        features, deciding=[(label, row) for label in content.classes], deciding_by="attention",
        deciding_start="adapted", deciding_items=33,
    )  # fmt: skip
    page = tmp_path / "report.html"
    page.write_text(render(content, shown), encoding="utf-8")
    seen = looked_at(page, tmp_path)
    figure = seen["found"]["figure-deciding"]
    assert figure["images"] == 3 * len(row)
    assert figure["loaded"]
    assert figure["width"] > 200
    assert not seen["wide"]


def test_curve_files_are_pictures(reported):
    run, _ = reported
    from PIL import Image

    with Image.open(run.curve_png) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert run.curve_svg.read_text(encoding="utf-8").startswith("<?xml")
