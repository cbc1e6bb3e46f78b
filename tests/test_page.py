import base64
import csv
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import re
import shutil
import time
from html import escape
from html.parser import HTMLParser

import pytest

from ltnorm import resolve as recipes
from ltnorm.errors import UsageError
from ltnorm.reporting import charts, marks, page, schema, views
from ltnorm.reporting.compare import Question, compare
from ltnorm.reporting.published import Published
from ltnorm.resolve import Overrides

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs chromium, chromedriver and selenium",
)
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vl_convert") is None, reason="needs vl-convert-python"
)

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "{{constructor.constructor('window.hacked=1')()}}",
    "signal' + (window.hacked=1) + '\u2028 datum.row <b>bold</b>",
)
TAILS = {"bn": 10.0, "gn": 4.0, "split": 9.0, "compound": 14.0}
COUNTS = [500, 200, 80, 30, 12, 5]


def run_of(folder, norm, seed, ratio=100, classes=COUNTS, names=None, **changes):
    """A made-up run of a real recipe, with its files."""
    [recipe] = recipes.resolve({}, Overrides({"dataset.ratio": ratio}, [], [norm], [seed]))
    shift = (seed - 1) * 0.7 + {"gn": 0.3, "compound": -0.2}.get(norm, 0) * seed**2
    known = {field.name: None for field in dataclasses.fields(schema.Result)}
    known |= dict.fromkeys(("macro_f1", "gmean", "worst_class", "ece"), 30.0 + shift)
    third = len(classes) / 3
    groups = [("head", "medium", "tail")[int(i / third)] for i in range(len(classes))]
    known |= {f"{group}_classes": groups.count(group) for group in ("head", "medium", "tail")}
    known |= {"data_seed": 2}
    known |= {"schema": schema.SCHEMA, "fingerprint": recipe.fingerprint(), "dataset": "made"}
    known |= {"profile": "exp", "ratio": float(ratio), "set_id": f"made-exp{ratio}"}
    known |= {"index_sha256": f"{ratio}", "model": "resnet32", "norm": norm, "norm_options": ""}
    known |= {"loss": "ce", "loss_options": "", "sampler": "instance", "seed": seed, "epochs": 3.0}
    known |= {"steps": 30, "batch_size": 8, "lr": 0.1, "precision": "fp32", "eval_split": "test"}
    known |= {"group_scheme": "thirds", "all": 40 + shift, "head": 80 - shift, "medium": 40.0}
    known |= {"tail": TAILS[norm] + shift, "nll": 1.5, "parameters": 464_154, "train_loss": 0.1}
    known |= {"images_processed": 9000, "images_backpropagated": 9000, "train_seconds": 3.0 + seed}
    known |= {"images_per_second": 1000.0, "device": "cpu", "torch": "2.11.0", "ltnorm": "0.1.0"}
    known |= {"finished": f"2026-01-0{1 + seed}T00:00:00+00:00"}
    known |= {"settings": schema.settings_json(recipe)}
    directory = folder / f"made-exp{ratio}" / f"resnet32-{norm}-ce" / f"seed{seed}"
    directory.mkdir(parents=True)
    names = names or [f"class {i}" for i in range(len(classes))]
    header = ["class", "name", "train_images", "group", "eval_images", "accuracy"]
    per_class = [
        [i, name, count, group, 10, round(90 - 80 * i / len(classes) + shift, 3)]
        for i, (name, count, group) in enumerate(zip(names, classes, groups, strict=True))
    ]
    write(directory / "per_class.csv", header, per_class)
    write(directory / "epochs.csv", ["epoch", "loss"], [[1, 2.0], [2, 1.5], [3, 1.0 + shift / 9]])
    (directory / "recipe.yaml").write_text("\n".join(["norm:", *HOSTILE]), encoding="utf-8")
    result = dataclasses.replace(schema.Result(**known), **changes)
    schema.write_result(directory, result)
    return schema.Run(result, directory)


def write(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def made(folder, ratios=(10, 100), seeds=3, **more):
    runs = [
        run_of(folder, norm, seed, ratio, **more)
        for ratio in ratios
        for norm in TAILS
        for seed in range(seeds)
    ]
    return compare(runs, Question())


def hostile(folder):
    """Two blocks of four rows; whatever text a run has is an attack."""
    names = [*HOSTILE, "plain", "plain"]
    changes = {"device": HOSTILE[0], "torch": HOSTILE[1], "precision": HOSTILE[2]}
    blocks = made(folder, names=names, dataset=HOSTILE[1], tag=HOSTILE[3], **changes)
    literature = Published(
        keys={},
        label=HOSTILE[1],
        paper=HOSTILE[1],
        values={"all": 70.4},
        source=HOSTILE[0],
        method_source="",
        note=HOSTILE[2],
        trials=None,
    )
    attacked = []
    for i, block in enumerate(blocks):
        rows = [dataclasses.replace(r, label=r.label + HOSTILE[i]) for r in block.rows]
        more = {"rows": tuple(rows), "baseline": rows[0].label, "published": (literature,)}
        attacked.append(dataclasses.replace(block, title=block.title + HOSTILE[i], **more))
    return attacked


class Tree(HTMLParser):
    """What a reader of HTML makes of a page: elements with their attributes, and its scripts."""

    VOID = ("meta", "input", "br", "path", "img", "link")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.scripts, self.mistakes = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return hostile(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def text(blocks):
    return page.page(blocks)


@pytest.fixture(scope="module")
def tree(text):
    return Tree(text)


def test_elements_are_closed_and_ids_are_unique(tree):
    assert tree.mistakes == []
    assert tree.open == []
    ids = [attrs["id"] for _, attrs in tree.elements if "id" in attrs]
    assert len(ids) == len({*ids})
    targets = {a["href"].removeprefix("#") for a in tree.all("a")}
    assert targets
    assert targets <= {*ids}


def test_no_text_of_results_becomes_an_element(tree, text):
    assert tree.all("img") == []
    assert tree.all("b") == [{}] * 5  # of the page's own legend
    assert len(tree.scripts) == 3
    assert not [name for _, attrs in tree.elements for name in attrs if name.startswith("on")]
    assert "window.hacked=1" in text  # it is there, as text
    assert HOSTILE[0] not in text


def test_the_plots_are_json_that_keeps_every_text(tree):
    raw = tree.scripts[0]
    assert not {*"<>&\u2028\u2029"} & {*raw}
    plots = json.loads(raw)
    cells = {str(cell) for data in plots["data"] for row in data["rows"] for cell in row}
    assert {f"0 {HOSTILE[0]}", f"3 {HOSTILE[3]}"} <= cells
    for kept in (plots["data"], plots["specs"]):
        assert len({json.dumps(one) for one in kept}) == len(kept)
    for chart in plots["charts"]:
        table = plots["data"][chart["data"]]
        spec = json.dumps(plots["specs"][chart["spec"]])
        fields = set(re.findall(r'"field": "(\w+)"', spec))
        assert fields
        assert fields <= {*table["columns"]}
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_only_the_pages_own_scripts_and_style_may_run_and_nothing_is_loaded(tree, text):
    [policy] = [m["content"] for m in tree.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    hashes = set(re.findall(r"sha256-([\w+/=]+)", policy))
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    own = {
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in [*tree.scripts[1:], *styles]
    }
    assert own == hashes
    assert not [a for _, a in tree.elements if {"src", "srcset", "action"} & {*a}]
    assert all(a["href"].startswith("#") for _, a in tree.elements if "href" in a)


def test_the_same_results_give_the_same_page_without_paths_of_the_machine(blocks, text):
    assert page.page(blocks) == text
    assert str(blocks[0].rows[0].runs[0].directory.parents[3]) not in text
    assert "The newest run finished 2026-01-03 00:00." in text


def test_headings_follow_each_other_and_tables_tell_what_they_are(tree):
    levels = [int(tag[1]) for tag, _ in tree.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(tree.all("caption")) == len(tree.all("table")) > 0
    assert {th.get("scope") for th in tree.all("th")} == {"row", "col"}
    assert all(a["aria-label"] for a in tree.all("div") if a.get("role") in ("img", "region"))
    assert tree.all("html") == [{"lang": "en"}]
    assert len(tree.all("main")) == 1


def test_cells_are_sorted_by_all_their_digits_and_missing_ones_are_marked(tmp_path):
    runs = [run_of(tmp_path, norm, seed, tail=None) for norm in ("bn", "gn") for seed in (0, 1, 2)]
    [block] = compare(runs)
    block.rows[0].mean["all"] = 100 / 3
    text = page.page([block])
    assert f'data-sort="{100 / 3!r}">33.3' in text
    assert 'data-sort="">–' in text
    assert "nan" not in re.findall(r'data-sort="(.*?)"', text)


def test_intervals_over_images_are_sorted_by_their_lower_end(tmp_path):
    [block] = made(tmp_path, ratios=[100])
    rows = []
    for row in block.rows:
        tail = {k: dataclasses.replace(d, images=(-1.25, 2.5)) for k, d in row.deltas.items()}
        rows.append(dataclasses.replace(row, deltas=tail))
    text = page.page([dataclasses.replace(block, rows=tuple(rows))])
    assert text.count('data-sort="-1.25">[-1.2, +2.5]') == 3


def test_recipes_cost_environment_and_each_seed_are_told(tree, text):
    captions = re.findall(r"<caption>(.*?)</caption>", text)
    kinds = [caption.split(":")[0] for caption in captions]
    for kind in ("Comparison", "Class by class", "Cost", "Environment", "Each seed"):
        assert kinds.count(kind) == 2
    assert kinds.count("Settings that differ between the rows") == 2
    assert '<th scope="row" class="text">norm.name</th>' in text
    assert text.count("<pre>norm:\n&lt;/script&gt;") == 8
    assert text.count("Across ratios") == 1
    assert '<tbody class="published"><tr><th scope="row" class="text">&quot;&gt;&lt;img' in text


def test_each_plot_is_told_in_words_where_it_is_not_drawn(tree, text):
    told = [a["aria-label"] for a in tree.all("div") if a.get("role") == "img"]
    assert len(told) == len(json.loads(tree.scripts[0])["charts"])
    assert all(f"This plot needs JavaScript. {escape(each)}</p>" in text for each in told)
    assert told[0].startswith("Differences to bn</script>")
    assert ": all +0.5, head -0.5, medium +0.0, tail -5.5;" in told[0]
    assert ": head 80.0 %, tail 10.0 %" in told[4]


def test_missing_files_leave_their_part_out(tmp_path):
    [block] = made(tmp_path, ratios=[100])
    for run in block.rows[1].runs:
        for name in ("per_class.csv", "epochs.csv", "recipe.yaml"):
            (run.directory / name).unlink()
    text = page.page([block])
    assert "3 of the runs have no per-class results that fit." in text
    assert "This run has no recipe.yaml." in text
    assert str(tmp_path) not in text
    shutil.rmtree(tmp_path)
    assert "12 of the runs have no per-class results that fit." in page.page([block])


def test_one_seed_without_a_baseline_is_a_page_too(tmp_path):
    runs = [run_of(tmp_path, norm, 0, head=None, tail=None) for norm in ("gn", "split")]
    titles = re.findall("<h4>(.*?)</h4>", page.page(compare(runs)))
    assert titles == ["Accuracy by group", "Accuracy by class and training images", "Training loss"]


def test_rows_of_different_images_have_no_one_count_a_class(tmp_path):
    runs = [
        run_of(tmp_path, "bn", seed, ratio, classes=[500, 70, 500 // ratio])
        for ratio in (10, 100)
        for seed in (0, 1)
    ]
    [block] = compare(runs, Question(by=("dataset.ratio",)))
    text = page.page([block])
    assert "Runs compared by ratio" in text
    assert "Accuracy by class" not in text
    assert ">500</td>" in text
    assert ">5 to 50</td>" in text


def test_plots_draw_what_the_tables_say(tmp_path):
    [block] = made(tmp_path, ratios=[100])
    table, _ = views.per_class(block)
    drawn = {chart.title: chart for chart in charts.of_block(block, marks.palette([block]), table)}
    compound = block.rows[3]
    delta = compound.deltas["tail"].estimate
    expected = [3, "tail", *(round(v, 4) for v in (delta.delta, delta.low, delta.high))]
    assert expected in drawn["Differences to bn"].data.rows
    place, head, tail = drawn["Head against tail"].data.rows[3][:3]
    assert (place, head, tail) == pytest.approx(
        (3, compound.mean["head"], compound.mean["tail"]), abs=1e-4
    )
    by_class = drawn["Accuracy by class and training images"].data
    assert by_class is drawn["Differences to bn by class"].data
    assert [row[3] for row in by_class.rows[:6]] == COUNTS
    assert by_class.rows[0][4] == pytest.approx(table.accuracy["bn"][0].mean)
    assert [row[1:] for row in drawn["Training loss"].data.rows[:2]] == [[1, 2.0], [2, 1.5]]


def test_many_classes_are_drawn_as_means_of_neighbours(tmp_path):
    [block] = made(tmp_path, ratios=[100], seeds=2, classes=[*range(1000, 0, -1)])
    table, _ = views.per_class(block)
    chart = charts.of_block(block, marks.palette([block]), table)[2]
    first = [row for row in chart.data.rows if row[0] == 0]
    assert len(first) <= charts.MOST_CLASSES
    assert first[0][2:5] == ["ranks 1–7", 997.0, pytest.approx(90 - 80 * 3 / 1000 - 0.35, abs=1e-3)]
    assert first[-1][2] == "ranks 995–1000"
    text = page.page([block])
    assert "neighbours in rank are averaged." in text
    assert len(text) < 3_000_000


def test_rows_differ_by_more_than_colour(tmp_path):
    [block] = made(tmp_path, ratios=[100], seeds=1)
    base = block.rows[0]
    rows = (base, *(dataclasses.replace(block.rows[1], label=f"r{i}") for i in range(60)))
    found = marks.palette([dataclasses.replace(block, rows=rows)])
    assert len({(s.colour, str(s.dash), s.shape) for s in found.values()}) == 61
    assert len({(str(s.dash), s.shape) for s in [*found.values()][:35]}) == 35
    assert found[base.label].colour == marks.BASELINE


def test_a_row_looks_the_same_in_every_table(tmp_path):
    first, second = made(tmp_path, seeds=1)
    fewer = dataclasses.replace(second, rows=second.rows[::3])
    found = marks.palette([first, fewer])
    assert marks.of_rows(fewer, found) == {label: found[label] for label in ("bn", "compound")}
    assert found == marks.palette([first])


def test_text_stands_out_in_light_and_dark():
    themes = re.findall(r":root \{(.*?)\}", page._asset("report.css"), re.DOTALL)
    assert len(themes) == 2

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for text in ("ink", "muted", "link"):
            for ground in ("paper", "raised"):
                pair = sorted((luminance(colours[text]), luminance(colours[ground])))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (text, ground)


def test_check_refuses_before_work_starts(tmp_path, monkeypatch):
    page.check(tmp_path / "report.html")
    with pytest.raises(UsageError, match=r"--html .*report.pdf is no page"):
        page.check(tmp_path / "report.pdf")
    with pytest.raises(UsageError, match="not writable"):
        page.check(tmp_path / "missing" / "report.html")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs vl-convert-python") as refused:
        page.check(tmp_path / "report.html")
    assert refused.value.hint == 'pip install "ltnorm[plot]"'


def test_the_command_writes_the_page(ltnorm, tmp_path):
    made(tmp_path / "results")
    answer = ltnorm("compare results --html report.html")
    assert answer.code == 0, answer.err
    assert "page written to report.html" in answer.err
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# In a browser.


@pytest.fixture(scope="module")
def browser(text, tmp_path_factory):
    """Chromium on the page, once all plots are drawn."""
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(text, encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"]
    for flag in [*flags, f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options=options, service=service) as driver:
        driver.get((folder / "report.html").as_uri())
        wait(lambda: driver.execute_script("return document.documentElement.dataset.plots"))
        yield driver


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the browser took too long"
        time.sleep(0.05)


def column(browser, place, shown=False):
    """The texts of a column of the first table, without the rows of the literature."""
    return browser.execute_script(
        "return [...document.querySelector('#table-0 table').tBodies[0].rows]"
        ".filter((row) => !arguments[1] || !row.hidden)"
        ".map((row) => row.cells[arguments[0]].textContent)",
        place,
        shown,
    )


def media(browser, **features):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]},
    )


@needs_browser
def test_the_page_loads_alone_and_silently(browser):
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    asked = [one["request"]["url"] for one in asked if one["documentURL"].startswith("file:")]
    assert [url.rpartition("/")[2] for url in asked] == ["report.html"]


@needs_browser
def test_plots_of_little_and_of_much_are_silent_too(browser, tmp_path):
    few = [run_of(tmp_path / "few", norm, 0, tail=None) for norm in ("bn", "gn")]
    many = [run_of(tmp_path / "many", n, 0, classes=[*range(400, 0, -2)]) for n in ("bn", "gn")]
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    for runs in (few, many):
        (tmp_path / "page.html").write_text(page.page(compare(runs)), encoding="utf-8")
        browser.get((tmp_path / "page.html").as_uri())
        wait(lambda: browser.execute_script("return document.documentElement.dataset.plots"))
        assert browser.get_log("browser") == []
    browser.close()
    browser.switch_to.window(first)


@needs_browser
def test_every_plot_is_drawn_with_its_text(browser, tree):
    plots = len(json.loads(tree.scripts[0])["charts"])
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.chart')]"
        ".map((e) => e.querySelectorAll('svg.marks path').length)"
    )
    assert len(drawn) == plots
    assert min(drawn) > 3
    texts = browser.execute_script("return document.querySelector('#plot-3 svg').textContent")
    assert "</scr" in texts  # the start of a class's name, on the axis


@needs_browser
def test_no_text_of_results_runs_or_becomes_an_element(browser):
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.execute_script("return document.scripts.length") == 3


@needs_browser
def test_a_click_sorts_and_another_turns_it_round(browser):
    from selenium.webdriver.common.by import By

    [button] = [
        b
        for b in browser.find_elements(By.CSS_SELECTOR, "#table-0 table th button")
        if b.text.startswith("tail")
    ][:1]
    heading = button.find_element(By.XPATH, "..")
    button.click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [label[:2] for label in column(browser, 0)] == ["gn", "sp", "bn", "co"]
    button.click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert [label[:2] for label in column(browser, 0)] == ["co", "bn", "sp", "gn"]
    last = "return document.querySelector('#table-0 table').lastElementChild.className"
    assert browser.execute_script(last) == "published"
    status = browser.execute_script("return document.getElementById('status').textContent")
    assert status.startswith("sorted by tail")


@needs_browser
def test_the_keyboard_sorts_with_a_focus_that_is_seen_and_missing_values_stay_last(browser):
    from selenium.webdriver.common.keys import Keys

    def press(key):
        browser.switch_to.active_element.send_keys(key)

    def focused(script):
        return browser.execute_script(f"const e = document.activeElement; return {script}")

    browser.execute_script("document.querySelector('#table-0 input').focus()")
    for _ in range(30):
        press(Keys.TAB)
        if focused("e.closest('th')?.textContent") == "Δ tail":
            break
    assert focused("e.tagName") == "BUTTON"
    assert focused("getComputedStyle(e).outlineStyle") == "solid"
    place = focused("e.closest('th').cellIndex")
    for order in ("ascending", "descending"):
        press(Keys.ENTER)
        assert focused("e.closest('th').ariaSort") == order
        assert column(browser, place)[-1] == "–"
        values = [float(cell.split()[0]) for cell in column(browser, place)[:-1]]
        assert values == sorted(values, reverse=order == "descending")


@needs_browser
def test_words_filter_rows_and_boxes_hide_columns(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    box = browser.find_element(By.CSS_SELECTOR, "#table-0 input[type=search]")
    box.send_keys("COMP")
    assert [label[:8] for label in column(browser, 0, shown=True)] == ["compound"]
    assert "1 of 5 rows" in browser.find_element(By.CSS_SELECTOR, "#table-0 .shown").text
    box.send_keys(Keys.BACKSPACE * 4)
    assert len(column(browser, 0, shown=True)) == 4
    browser.find_element(By.CSS_SELECTOR, "#table-0 .columns summary").click()
    choice = browser.find_element(By.CSS_SELECTOR, "#table-0 .columns input")
    second = browser.find_element(By.CSS_SELECTOR, "#table-0 table td")
    assert second.is_displayed()
    choice.click()
    assert not second.is_displayed()
    choice.click()
    assert second.is_displayed()


@needs_browser
def test_a_value_is_told_on_hover_as_text(browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    media(browser, prefers_reduced_motion="reduce")
    point = browser.find_elements(By.CSS_SELECTOR, "#plot-3 .mark-symbol path")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser).move_to_element(point).perform()
    tip = "return document.querySelector('#vg-tooltip-element.visible')?.textContent"
    wait(lambda: browser.execute_script(tip), seconds=5)
    told = browser.execute_script(tip)
    assert "training images" in told
    assert "gn</script><script>" in told
    assert browser.execute_script("return window.hacked") is None


@needs_browser
def test_dark_changes_the_page_and_the_plots(browser):
    script = (
        "return [getComputedStyle(document.body).backgroundColor,"
        "getComputedStyle(document.querySelector('.chart svg text')).fill,"
        "getComputedStyle(document.querySelector('.chart .mark-symbol path')).fill]"
    )
    media(browser, prefers_color_scheme="light")
    light = browser.execute_script(script)
    media(browser, prefers_color_scheme="dark")
    dark = browser.execute_script(script)
    media(browser, prefers_color_scheme="light")
    assert light == ["rgb(255, 255, 255)", "rgb(27, 31, 36)", "rgb(0, 114, 178)"]
    assert dark == ["rgb(20, 23, 27)", "rgb(230, 233, 237)", "rgb(61, 155, 224)"]


@needs_browser
def test_a_phone_scrolls_tables_but_not_the_page(browser):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened = "document.querySelectorAll('details').forEach((e) => { e.open = true; });"
        browser.execute_script(opened)
        width = "return document.documentElement.scrollWidth"
        wait(lambda: browser.execute_script(width) == 360, seconds=10)
        table = "const e = document.querySelector('.scroll'); return e.scrollWidth > e.clientWidth"
        assert browser.execute_script(table)
    finally:
        closed = "document.querySelectorAll('details').forEach((e) => { e.open = false; });"
        browser.execute_script(closed)
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_it_prints_without_controls(browser):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = "return [...document.querySelectorAll('.tools')].every((e) => !e.offsetParent)"
    assert browser.execute_script(hidden)
    cut = (
        "return [...document.querySelectorAll('.scroll')].map((e) => getComputedStyle(e).overflow)"
    )
    assert {*browser.execute_script(cut)} == {"visible"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    document = base64.b64decode(printed)
    assert document.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", document)) >= 3
