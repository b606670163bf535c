"""Tasks for lm_eval over documents made here: nothing is downloaded."""

import json
import random
from pathlib import Path

from support.requests import WORDS


def make_tasks(folder: Path, documents: int = 30) -> None:
    """Write a group of two multiple-choice tasks and a task that generates, over documents made here."""
    folder.mkdir()
    draw = random.Random(1)
    for name in ("one", "two"):
        lines = [
            {"q": " ".join(draw.choices(WORDS, k=30)), "choices": draw.sample(WORDS, 4), "gold": draw.randrange(4)}
            for _ in range(documents)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / f"{name}.yaml").write_text(
            _task(f"words_{name}", folder / f"{name}.jsonl")
            + "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
            + "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        )
    (folder / "group.yaml").write_text(
        "group: words\ntask: [words_one, words_two]\n"
        "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    (folder / "written.yaml").write_text(
        _task("words_written", folder / "one.jsonl")
        + 'output_type: generate_until\ngeneration_kwargs:\n  max_gen_toks: 8\n  until: ["\\n\\n"]\n'
        + 'doc_to_target: "{{choices[gold]}}"\n'
        + "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )


def _task(name: str, data: Path) -> str:
    return (
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        'doc_to_text: "{{q}}\\nNext:"\n'
    )
