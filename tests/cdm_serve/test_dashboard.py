"""Dashboard and alerts ask for nothing that the server does not tell: every metric and label is in its exposition."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cdm_serve.costs import CostModel
from cdm_serve.settings import ServeSettings
from engines.bundle import Bundle
from tests.cdm_serve.helpers import PATIENCE_S, App, Gate
from tests.cdm_serve.test_guard import AS_ADMIN, write_keys

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/cdm-serve.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8"))

SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds to everything."""
OF_PROMETHEUS = {"up": set(), "scrape_duration_seconds": set()}
FUNCTIONS = {
    "sum", "rate", "increase", "histogram_quantile", "time", "label_values", "by", "on", "unless",
}  # fmt: skip

TOKEN = re.compile(
    r"""(?P<string>"[^"]*")|(?P<range>\[[^\]]*\])|(?P<number>\d+(\.\d+)?)|(?P<name>[a-zA-Z_:]\w*)"""
    r"""|(?P<matcher>=~|!~|!=|==|[=<>])|(?P<other>[(){},*/+-])|(?P<space>\s+)|(?P<wrong>.)"""
)


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


def expressions() -> Iterator[tuple[str, str]]:
    """What asks, and its PromQL."""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def asked(expression: str) -> tuple[dict[str, set[str]], set[str]]:
    """A PromQL expression's metrics, each with the labels that its braces match; and the labels it groups by."""
    metrics: dict[str, set[str]] = {}
    grouped: set[str] = set()
    tokens = [(m.lastgroup, m.group()) for m in TOKEN.finditer(expression) if m.lastgroup != "space"]
    wrong = [text for kind, text in tokens if kind == "wrong"]
    assert not wrong, f"{wrong} in {expression}"
    depth = {"(": 0, "{": 0}
    metric, grouping = "", 0
    for i, (kind, text) in enumerate(tokens):
        if text in "({":
            depth[text] += 1
        elif text in ")}":
            depth["(" if text == ")" else "{"] -= 1
            grouping = grouping if depth["("] >= grouping else 0
        elif kind == "name" and depth["{"]:
            metrics[metric].add(text)
        elif kind == "name" and grouping:
            grouped.add(text)
        elif kind == "name" and text in ("by", "on"):
            grouping = depth["("] + 1
        elif kind == "name" and text not in FUNCTIONS:
            if tokens[0][1] == "label_values" and tokens[i - 1][1] == ",":
                grouped.add(text)
            else:
                metric = text
                metrics.setdefault(text, set())
    assert depth == {"(": 0, "{": 0}, f"unbalanced: {expression}"
    return metrics, grouped


@pytest.fixture(scope="module")
def told(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Metric → labels, as a server tells them that has seen something of everything."""
    folder = tmp_path_factory.mktemp("dashboard")
    blocked = folder / "words.txt"
    blocked.write_text("quince\n")
    app = App(bundle, Gate(), keys=write_keys(folder / "keys.json"), block_list=blocked, result_cache=4)
    with app.client:
        assert app.service.runner.ready.wait(PATIENCE_S)
        body = {"prompt": "cat", "seed": 1, "deadline_ms": 60000}
        for prompt in ("cat", "cat", "dog", "quince"):
            app.client.post("/generate", json={**body, "prompt": prompt}, headers=AS_ADMIN)
        CostModel.record(
            app.service.costs, "denoise", (64, 64), 1, 0.01
        )  # the helper's own model learns nothing
        text = app.client.get("/metrics", headers=AS_ADMIN).text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_metric_and_label_exists(told: dict[str, set[str]], where: str, expression: str) -> None:
    metrics, grouped = asked(expression)
    assert metrics, f"{where} asks for nothing"
    known = told | OF_PROMETHEUS
    for metric, matched in metrics.items():
        assert metric in known, f"{where}: there is no {metric}"
        assert matched <= known[metric] | SCRAPED, f"{where}: {metric} has no {matched - known[metric]}"
    for label in grouped:
        assert any(label in known[metric] | SCRAPED for metric in metrics), f"{where}: nothing has {label}"


def test_labels_in_legends_are_those_grouped_by(told: dict[str, set[str]]) -> None:
    for panel in panels():
        for target in panel.get("targets", ()):
            wanted = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target.get("legendFormat", "")))
            metrics, grouped = asked(target["expr"])
            left = (
                grouped
                if "sum" in target["expr"]
                else set().union(*(told.get(m, set()) for m in metrics)) | SCRAPED
            )
            assert wanted <= left, f"{panel['title']}: {wanted - left} is not in the result"


def test_every_metric_of_the_server_is_shown(told: dict[str, set[str]]) -> None:
    """A new metric belongs on the dashboard, or in this list with a reason."""
    shown = {metric for _, expression in expressions() for metric in asked(expression)[0]}
    base = {re.sub(r"_(bucket|sum|count)$", "", metric) for metric in shown}
    ours = {metric for metric in told if metric.startswith("cdm_") and not metric.endswith("_created")}
    assert {metric for metric in ours if re.sub(r"_(bucket|sum|count)$", "", metric) not in base} == set()


def test_dashboard_can_be_imported() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "model"}
    for panel in panels():
        assert panel["title"]
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert [target["refId"] for target in panel["targets"]] == list("ABC"[: len(panel["targets"])])


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


@pytest.mark.parametrize("wrong", ["sum(rate(cdm_x[5m])", "rate(cdm_x{a='b'}[5m])", "cdm_x @ 5"])
def test_tokenizer_notices_what_is_no_promql(wrong: str) -> None:
    with pytest.raises(AssertionError):
        asked(wrong)


def test_compose_file_mounts_what_is_there_and_sets_what_exists() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for name, service in compose["services"].items():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), f"{name} mounts {source}"
        assert set(service.get("depends_on", ())) <= set(compose["services"])
    variables = compose["services"]["cdm-serve"]["environment"]
    fields = {f"CDM_SERVE_{field.upper()}" for field in ServeSettings.model_fields}
    assert {name for name in variables if name.startswith("CDM_")} <= fields
    targets = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))[
        "scrape_configs"
    ]
    assert targets[0]["static_configs"][0]["targets"] == ["cdm-serve:8000"]
    assert targets[0]["job_name"] == "cdm-serve"
