"""Writes the parameters cells of the run notebooks from the declarations; `make parameters`.

A notebook whose parameters are its own (ablation, faults, benchmarks) is left alone."""

import json

import house

REPORT = """data media_root columns model image_size context_length min_area out_of_range
max_regions batch_size num_frames test_data split check_files pages fix output strict"""


def written_cells() -> dict:
    "Path of a run notebook -> text of its parameters cell."
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.core.notebook import parameter_cell
    from fgclip_nb.data.findings import ReportConfig
    from fgclip_nb.evaluation.config import EvaluateConfig

    return {
        house.ROOT / "nbs/train.ipynb": parameter_cell(TrainConfig),
        house.ROOT / "nbs/evaluate.ipynb": parameter_cell(EvaluateConfig, what="evaluation"),
        house.ROOT / "nbs/data_report.ipynb": parameter_cell(
            ReportConfig, REPORT.split(), "report"
        ),
    }


def tagged(notebook: dict) -> list:
    "Cells with papermill's tag."
    return [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]


if __name__ == "__main__":
    for path, text in written_cells().items():
        notebook = json.loads(path.read_text())
        for cell in tagged(notebook):
            cell["source"] = text.splitlines(True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
