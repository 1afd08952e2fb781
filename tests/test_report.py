"""The page of a run: what is on it, that no text of a run can break it, and that it works in a browser."""

import base64
import gzip
import json
import re
import runpy
import sys

import browser
import numpy as np
import pytest
from conftest import ROOT

from common import report
from common.report import Shown, before_and_after, health, thin
from common.robot.video import write_mp4

NASTY = [
    "</script><script>window.harmed = 1</script>",
    '<img src=x onerror="window.harmed = 2">',
    "</details></table><!-- $data ${title} \\u003c \u2028 &amp; \0 ü 数",
]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, learning_rate=0.1, steps=200, completions=True):
    """A folder as grpo_arithmetic.py leaves it, in which completions try to break the page."""
    folder.mkdir(parents=True)
    args = {"learning_rate": learning_rate, "seed": 1, "exp_name": NASTY[0], "dtype": "auto"}
    facts = {"args": args, "command": f"grpo_arithmetic.py {NASTY[1]}", "versions": {"torch": "2"}, "device": "cpu"}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "grpo_arithmetic.py").write_text("")
    rows = [
        {"step": i + 1, "time/elapsed_s": i / 10, "train/reward": i / 100, "train/kl": 9.0 if i == 55 else 0.1}
        | ({"arithmetic_eval": 0.5, "arithmetic_eval_low": 0.4, "arithmetic_eval_high": 0.6} if i % 50 == 0 else {})
        for i in range(steps)
    ]
    lines(folder / "metrics.jsonl", rows)
    if completions:
        said = [(step, text) for step in (1, 2, 3) for text in (*NASTY, "7", "8")]
        lines(
            folder / "completions.jsonl",
            [
                {"step": step, "prompt": "3 + 4 = ", "completion": text, "expected": "7", "is_correct": text == "7"}
                | {"reward": 1.0 if text == "7" else -1.0}
                for step, text in said
            ],
        )
    return folder


def test_a_page_drawn_later_has_the_same_bytes(monkeypatch):
    first = report.packed({"a": 1})
    monkeypatch.setattr(gzip.time, "time", lambda: 1e9)  # gzip would write down when
    assert report.packed({"a": 1}) == first


def unpack(text: str):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("report") / "grpo_arithmetic" / "one")
    frames = np.random.default_rng(0).integers(0, 255, (20, 48, 48, 3), dtype=np.uint8)
    write_mp4(folder / "videos" / "step-000000200.mp4", frames, 10)
    lines(folder / "video_table.jsonl", [{"step": 200, "video": "videos/step-000000200.mp4", "episode_return": -1.25}])
    (folder / "open_loop").mkdir()
    (folder / "open_loop" / "episode_000005.png").write_bytes(base64.b64decode(PIXEL))
    return folder


@pytest.fixture(scope="module")
def page(run):
    return report.write([run])


# ---- without a browser -----------------------------------------------------------------------------------------------


def test_texts_of_a_run_are_nowhere_on_the_page_but_in_what_is_packed(page):
    text = page.read_text()
    assert "harmed" not in text and text.count("</script>") == 3
    assert not re.search(r"""(?:src|href)=["']?https?:|@import|url\(""", text)  # and nothing is fetched
    (settings,) = [unpack(t) for t in data_of(text)["settings"]]
    assert NASTY[0] in settings["data"][1] and "MIT" not in settings["columns"]
    assert "uPlot" in text and (ROOT / "common/report/uplot/LICENSE").exists()


def test_what_differs_between_runs(tmp_path):
    runs = [make_run(tmp_path / name, rate, 5, False) for name, rate in (("a", 0.1), ("b", 0.2), ("c", 0.1))]
    page = report.write(runs, tmp_path / "out" / "three.html")
    table = unpack(data_of(page.read_text())["settings"][0])
    assert table["name"] == "What differs" and table["columns"] == ["setting", "a", "b", "c"]
    assert table["data"] == [["--learning-rate"], ["0.1"], ["0.2"], ["0.1"]]


def test_a_long_run_stays_below_five_megabytes_with_its_first_and_last_step(tmp_path):
    folder, random = make_run(tmp_path / "long", steps=20_000, completions=False), np.random.default_rng(0)
    rows = [
        {"step": step, "prompt": f"p{i}", "completion": random.bytes(600).hex(), "is_correct": False}
        for step in range(1, 61)
        for i in range(60)
    ]  # 2 MB when packed
    lines(folder / "completions.jsonl", rows)
    (folder / "open_loop").mkdir()
    for i in range(40):
        (folder / "open_loop" / f"episode_{i:06d}.png").write_bytes(random.bytes(100_000))
    page = report.write([folder], tmp_path / "report.html")
    assert page.stat().st_size < 5_000_000
    data = data_of(page.read_text())
    table = next(t for t in map(unpack, data["tables"]) if t["name"] == "completions")
    steps = table["data"][table["columns"].index("step")]
    assert steps[0] == 1 and steps[-1] == 60 and f"{len(steps):,} of 3,600" in table["note"]
    shown = [one["text"].split("episode_")[1] for one in data["Open loop"]["shown"]]
    assert shown[0] == "000000" and shown[-1] == "000039" and len(shown) < 40 and "of 40" in data["Open loop"]["note"]


def test_thinning_keeps_ends_and_peaks():
    values = [0.0] * 50_000
    values[31_234], values[7] = 5.0, -5.0
    at, kept = thin(list(range(50_000)), values)
    assert len(at) <= report.POINTS + 2 and at[0] == 0 and at[-1] == 49_999 and at == sorted(set(at))
    assert kept[at.index(31_234)] == 5.0 and kept[at.index(7)] == -5.0


def test_before_and_after_pairs_the_first_and_the_last_time_of_a_problem():
    def row(step, text, right, prompt="a"):
        return {"step": step, "prompt": prompt, "completion": text, "expected": "1", "is_correct": right}

    rows = [row(1, "0", False), row(1, "0", False), row(1, "1", True), row(3, "5", False), row(9, "1", True)]
    (line,) = before_and_after([*rows, row(4, "1", True, "only once")])
    assert (line["before: step"], line["before"], line["before: right"]) == (1, "0  (2 times)\n1", pytest.approx(1 / 3))
    assert (line["after: step"], line["after"], line["after: right"]) == (9, "1", 1)
    assert line["gain"] == pytest.approx(2 / 3)
    assert before_and_after([{"step": 1, "joint": "x", "mse": 0.1}]) == []


@pytest.mark.parametrize(
    "text, name, expected",
    [
        ("0", "x", (0, 0)),
        ("below 0.8", "x", (-np.inf, 0.8)),
        ("0 at step 1, then below 0.5", "x", (-np.inf, 0.5)),
        ("above 0.5 and rising", "x", (0.5, np.inf)),
        ("above 0.3 in the second half of a run", "x", (0.3, np.inf)),
        ("4 to 20, the more the smaller the noise", "x", (4, 20)),
        ("falls below 0.05", "x", (-np.inf, 0.05)),
        ("mean below 1e-4", "gap/mean", (-np.inf, 1e-4)),
        ("mean below 1e-4", "gap/max", None),
        ("below 0.05 with workers", "x", None),  # a condition that the run may not meet
        ("0 without `--refill`", "x", None),
        ("below `eval/`", "x", None),
        ("50 steps in Fetch", "x", None),
        ("Reach 0.02, Push 0.07", "x", None),
        ("below both baselines by a factor of 5 or more", "x", None),
        ("rises", "x", None),
    ],
)
def test_ranges_are_read_from_the_words_of_the_page(text, name, expected):
    assert health.healthy_range(text, name) == expected


def test_verdicts():
    def says(values, healthy, broken=""):
        return health.verdict(np.array(values, dtype=float), healthy, broken, "x")

    assert says([0, 0.9, 0.1, 0.2], "0 at step 1, then below 0.5", "above 5: …") == ("in range", 0.75)
    assert says([0, 0, 0, 1.0], "below 0.5", "above 5: …") == ("out of range", 0.75)
    assert says([0, 0, 0, 6.0], "below 0.5", "above 5: …") == ("looks broken", 0.75)
    assert says([0.5, 0.5, 1, 1], "below 0.8", "1: nothing to learn")[0] == "looks broken"
    assert says([1, 2, 3, 4], "rises")[0] == says([4, 3], "falls slowly")[0] == "in range"
    assert says([1, 2, 3, 4], "does not fall")[0] == "in range" and says([2, 1], "none falls")[0] == "out of range"
    assert says([1, 2], "stays")[0] == says([1], "rises")[0] == says([3, 1], "falls late")[0] == ""
    assert health.precise("mean below 1e-4 in fp32, 0.05 in bfloat16", True) == "mean below 0.05"
    assert health.precise("below 1e-5 in fp32", False) == "below 1e-5"
    assert health.precise("below 1e-5 in fp32", True) == ""


@pytest.mark.parametrize("kept", ["command", "copy", "place"])
def test_a_run_knows_its_script_wherever_it_is_copied(tmp_path, kept):
    folder = make_run(tmp_path / "ppo_fetch" / ("grpo_arithmetic" if kept == "place" else "mine") / "run")
    if kept != "command":
        (folder / "config.json").write_text(json.dumps({"command": "my_variant.py"}))
    if kept != "copy":
        (folder / "grpo_arithmetic.py").unlink()
    assert Shown(folder).script == "grpo_arithmetic"


def test_health_of_a_run_comes_from_its_page(run):
    found = {line["metric"]: line for line in Shown(run).health()}
    assert (
        found["train/kl"]["last quarter"] == pytest.approx(0.1)
        and found["train/kl"]["max"] == 9.0
        and found["train/kl"]["verdict"] == "in range"
    )
    assert (
        found["train/kl"]["share in range"] == 199 / 200
        and "leaves its language" in found["train/kl"]["broken looks like"]
    )
    assert all(health.table(script) for script in report.ROOMS)


def test_the_command_and_what_it_refuses(run, tmp_path, monkeypatch, capsys):
    (run / "metrics.jsonl").open("a").write('{"step": 201, "train/re')  # a run that goes on
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--out", str(tmp_path / "r.html")])
    runpy.run_module("common.report", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(tmp_path / "r.html")
    assert len(unpack(data_of((tmp_path / "r.html").read_text())["curves"])["runs"][0]["series"]["step"][0]) == 200
    with pytest.raises(SystemExit) as stop:
        report.write([tmp_path / "nothing"], tmp_path / "x.html")
    assert stop.value.code == 2 and not (tmp_path / "x.html").exists()
    assert capsys.readouterr().err.count("\n") == 1


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    if not browser.FOUND:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed (Debian: apt-get install chromium)")
    window = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


def rows_shown(window, table) -> list[list[str]]:
    rows = f"[...document.getElementById('{table}').querySelectorAll('tbody tr')]"
    return window.do(f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))")


def type_into(window, selector, text) -> None:
    window.do(f"document.querySelector({json.dumps(selector)}).select()")
    window.do(f"document.querySelector({json.dumps(selector)}).focus()")
    window.call("Input.insertText", text=text)


def test_the_page_opens_without_a_network_and_shows_texts_as_texts(page, window):
    window.open(page)
    asked = [m["params"]["request"]["url"] for m in window.said if m["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("data:", "file:")) for url in asked)
    assert [m for m in window.said if m["method"] == "Runtime.exceptionThrown"] == []
    assert window.do("window.harmed") is None
    cells = {row[2] for row in rows_shown(window, "completions")}
    assert cells == {*NASTY, "7", "8"}
    assert window.do("document.images.length") == 1  # the open-loop plot
    assert window.do("document.images[0].naturalWidth") == 1


def test_completions_can_be_searched_filtered_and_ordered(page, window):
    window.open(page)
    assert len(rows_shown(window, "completions")) == 15
    type_into(window, "#completions input[type=search]", "ONERROR")
    assert {row[2] for row in rows_shown(window, "completions")} == {NASTY[1]}
    assert "3 of 15 rows" in window.do("document.querySelector('#completions .count').textContent")
    window.do("document.querySelector('#completions input[type=search]').value = ''")
    type_into(window, "#completions thead input[placeholder=min]", "2")  # of the first column: step
    assert {row[0] for row in rows_shown(window, "completions")} == {"2", "3"}
    right = (
        "[...document.querySelectorAll('#completions select')].find(s => [...s.options].some(o => o.value === 'yes'))"
    )
    window.do(f"{right}.value = 'yes', {right}.onchange()")
    assert [row[2] for row in rows_shown(window, "completions")] == ["7", "7"]
    window.do("document.querySelector('#completions thead th').click()")
    window.do("document.querySelector('#completions thead th').click()")
    assert [row[0] for row in rows_shown(window, "completions")] == ["3", "2"]
    (pair,) = rows_shown(window, "completions, before and after")
    assert pair[0] == "3 + 4 = " and pair[2] == "1" and pair[5] == "3"


def test_curves_can_be_hovered_and_zoomed(page, window):
    window.open(page)
    titles = window.do("[...document.querySelectorAll('#curves h3')].map(h => h.textContent)")
    kl = titles.index("KL to the reference, log scale")
    window.do(f"charts[{kl}].root.scrollIntoView()")
    box = window.do(f"(b => [b.left, b.top, b.width, b.height])(charts[{kl}].over.getBoundingClientRect())")

    def at(x, y):
        return box[0] + x * box[2], box[1] + y * box[3]

    window.mouse("mouseMoved", *at(0.28, 0.5))
    legend = window.do(f"charts[{kl}].root.querySelector('.u-legend').textContent")
    assert re.search(r"step5\dtrain/kl(0\.1|9)", legend)
    scale = f"[charts[{kl}].scales.x.min, charts[{kl}].scales.x.max]"
    assert window.do(scale) == [1, 200]
    window.mouse("mousePressed", *at(0.25, 0.5))
    window.mouse("mouseMoved", *at(0.4, 0.5))
    window.mouse("mouseMoved", *at(0.5, 0.5))
    window.mouse("mouseReleased", *at(0.5, 0.5))
    window.do("new Promise(requestAnimationFrame)")
    low, high = window.do(scale)
    assert 45 < low < 55 and 95 < high < 105
    for clicks in (1, 2):
        window.mouse("mousePressed", *at(0.5, 0.5), clicks)
        window.mouse("mouseReleased", *at(0.5, 0.5), clicks)
    window.do("new Promise(requestAnimationFrame)")
    assert window.do(scale) == [1, 200]
    window.do("(m => { m.value = 'reward'; m.onchange({ target: m }) })(document.getElementById('more'))")
    assert window.do("document.querySelectorAll('#others .chart').length") == 1


def test_videos_play(page, window):
    window.open(page)
    played = window.do(
        "(async () => { const v = document.querySelector('video'); await v.play();"
        "await new Promise(r => setTimeout(r, 300)); return [v.currentTime, v.videoWidth, v.error] })()"
    )
    assert played[0] > 0 and played[1:] == [48, None]
    assert "episode_return -1.25" in window.do("document.querySelector('video + figcaption').textContent")
