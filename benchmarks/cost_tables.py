"""Where a simulation's costs come from: a table that ships, a JSON file, or what a server has measured of itself.

table = find_costs("gpu-like")                       # `benchmarks/costs/gpu-like.json`
table = find_costs("http://127.0.0.1:8000")          # the gauge `cdm_cost_seconds` of a running server
table = find_costs("measure")                        # the same of one that is started for it, with its bundled model
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import key_headers
from benchmarks.server import Server, ServerError
from cdm_serve.costs import TEXT, CostModel
from engines.call_costs import CallCost, CostTable, read_cost_table

FOLDER = Path(__file__).parent / "costs"
MEASURE = "measure"
GAUGE = "cdm_cost_seconds"


def built_in() -> list[str]:
    """Names of the tables that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_costs(source: str) -> CostTable:
    """The table that `source` names.

    Raises:
        CostTableError: no such file, or it is no cost table.
        ServerError: the server does not start, does not answer, or has measured nothing yet.
    """
    if source == MEASURE:
        with Server(["--log-level", "warning"]) as server:
            return costs_of_server(server.url)
    if source.startswith(("http://", "https://")):
        return costs_of_server(source)
    return read_cost_table(FOLDER / f"{source}.json" if source in built_in() else Path(source))


def costs_of_server(url: str) -> CostTable:
    """What the server at `url` has measured, by its `/metrics`. With keys, `CDM_API_KEY` must hold an admin's."""
    url = url.rstrip("/")
    try:
        with httpx.Client(timeout=30, trust_env=False, headers=key_headers()) as client:
            info = client.get(f"{url}/info").raise_for_status().json()
            text = client.get(f"{url}/metrics").raise_for_status().text
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(f"{url} does not tell its costs: {error}") from error
    engine = info["engine"]
    source = (
        f"measured by {engine['runtime']} {engine['version']} {engine['precision']} on {engine['device']}"
    )
    rows = costs_in(text, info["model"])
    if not rows:
        raise ServerError(f"{url} has measured nothing yet; wait until its /readyz answers 200")
    return CostTable(name=info["model"], source=source, rows=rows)


def costs_in(text: str, model: str) -> tuple[CallCost, ...]:
    """The cost model of `model` in a server's `/metrics`."""
    return tuple(
        CallCost.model_validate(
            {
                **{name: value for name, value in sample.labels.items() if value and name != "model"},
                "seconds": sample.value,
            }
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == GAUGE and sample.labels["model"] == model
    )


def save_costs(table: CostTable, path: Path) -> None:
    """Write what `read_cost_table` reads, a row a line."""
    rows = ",\n".join("    " + json.dumps(row.model_dump(exclude_none=True)) for row in table.rows)
    head = f'{{\n  "name": {json.dumps(table.name)},\n  "source": {json.dumps(table.source)},\n'
    path.write_text(f'{head}  "rows": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


def cost_model(table: CostTable) -> CostModel:
    """The scheduler's cost model that believes the table."""
    return CostModel.of(
        (row.stage, TEXT if row.stage == "encode" else (row.width, row.height), row.batch, row.seconds)
        for row in table.rows
    )
