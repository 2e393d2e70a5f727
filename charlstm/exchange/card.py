"""The model card of an exported model: README.md in the format of the Hugging Face hub."""

import math
from pathlib import PurePath
from typing import Any

from charlstm.errors import one_line, printable
from charlstm.runs.folder import Run
from charlstm.runs.metrics import sample_after_prompt

# The front matter has only what is true of every model of this package.
_CARD = """---
library_name: charlstm
pipeline_tag: text-generation
tags:
- charlstm
- jax
- lstm
- character-level
---

# {name}

A character-level LSTM language model of charlstm, trained on {text}.

| | |
|---|---|
{table}

{sample}## Load it

{loading}

## Files

{files}
- `vocab.json`: the characters, in the order of their ids.
- `config.json`: the settings, the path and hash of the text, versions, metrics and checksums.
- `prompts.json`: {num_prompts} passages of the training text. Samples without a prompt start from
  one of them.

Add the licence of the text and of the weights here before you publish this folder.
"""


def model_card(
    run: Run, metrics: dict[str, Any], num_params: int, name: str, files: str, loading: str
) -> str:
    """Return the model card of a run.

    Args:
      run: the run.
      metrics: the record of the checkpoint, as metrics_of returns it.
      num_params: the number of parameters.
      name: the title.
      files: Markdown that lists the files of the format.
      loading: Markdown that says how to load it.
    """
    text = _code(PurePath(run.text.source).name) if run.text.source else "an unknown text"
    table = _rows(run, metrics, num_params)
    return _CARD.format(
        name=_plain(name),
        text=text,
        table="\n".join(f"| {label} | {value} |" for label, value in table.items()),
        sample=_sample(metrics),
        loading=loading.strip(),
        files=files.strip(),
        num_prompts=len(run.prompts),
    )


def metrics_of(records: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """Return the record of the 'best' or 'latest' checkpoint; none without records."""
    validated = [record for record in records if math.isfinite(record.get("val/loss", math.nan))]
    if which == "best" and validated:
        return min(validated, key=lambda record: record["val/loss"])
    return records[-1] if records else {}


def _rows(run: Run, metrics: dict[str, Any], num_params: int) -> dict[str, str]:
    text, model = run.text, run.config.model
    parts = {"multiplicative": "multiplicative", "recurrent_rms_norm": "recurrent RMS norm"}
    parts |= {"tie_embeddings": "tied embeddings"}
    kinds = [name for key, name in parts.items() if model[key]]
    rows = {
        "held-out bits per character": _number(metrics, "val/bits_per_char", ".3f"),
        "held-out accuracy": _number(metrics, "val/accuracy", ".1%"),
        "training steps": _number(metrics, "step", ",.0f"),
        "epochs": _number(metrics, "epoch", ".1f"),
        "training time in seconds": _number(metrics, "seconds", ",.0f"),
        "parameters": f"{num_params:,}",
        "layers": f"{model.num_layers} of {model.hidden_size} units"
        + (f" ({', '.join(kinds)})" if kinds else ""),
        "input": model.input,
        "distinct characters": f"{len(run.vocab):,}",
    }
    if text.source:
        rows |= {
            "training characters": f"{text.training_characters:,}",
            "held-out characters": f"{text.validation_characters:,}",
            "SHA-256 of the text": _code(text.sha256),
            "devices": _code(", ".join(map(str, run.machine["devices"]))),
        }
    return {label: value for label, value in rows.items() if value}


def _number(metrics: dict[str, Any], name: str, form: str) -> str:
    value = metrics.get(name)
    return format(value, form) if isinstance(value, int | float) else ""


def _sample(metrics: dict[str, Any]) -> str:
    if not all(isinstance(metrics.get(name), str) for name in ("prompt", "sample")):
        return ""
    lines = printable(sample_after_prompt(metrics)).splitlines()
    # Indented, since a fence could occur in the text.
    body = "\n".join(f"    {line}".rstrip() for line in lines)
    return f"A sample, after its prompt in brackets:\n\n{body}\n\n"


def _code(text: str) -> str:
    return f"`{one_line(text).replace('`', chr(39)).replace('|', '/')}`"


def _plain(text: str) -> str:
    # Without what Markdown or HTML would interpret.
    return "".join(char if char.isalnum() or char in " ._-" else "-" for char in one_line(text))
