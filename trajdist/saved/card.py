"""The model card of an adapter: a README.md with the YAML front matter that the Hugging Face hub reads."""

from __future__ import annotations

from typing import Any

import yaml

from trajdist import __version__
from trajdist.config import Config

# No base_model: the hub expects a repository name there, but the base is the run's own Phase 1 model.
FRONT = {"library_name": "peft", "tags": ["trajdist", "anomaly-detection", "lora", "image"]}


def adapter_card(config: Config, base: str, data: dict[str, Any], summary: dict[str, Any]) -> str:
    """Render the card as Markdown: base model, data, training settings and results.

    Args:
        config: the run's config.
        base: fingerprint of the base model.
        data: ``trained_on`` and ``held_out`` image counts, ``fingerprint`` of the image list, and ``num_processes``.
        summary: the Phase 2 entry of ``summary.json``.
    """
    lora, adaptation = config.domain_adaptation.lora, config.domain_adaptation
    sections = {
        "Base": {
            "fingerprint": base,
            "backbone": f"{config.backbone.name}, weights {config.backbone.weights}",
            "sequence model": f"{config.model.type}, hidden_dim {config.model.hidden_dim}, "
            f"latent_dim {config.model.latent_dim}, {config.model.num_layers} layers",
            "images": f"{config.data.image_size} x {config.data.image_size} pixels, {config.data.domain.fit}",
        },
        "Data": {
            "path": config.data.domain.path,
            "images trained on": data["trained_on"],
            "images held out for calibration": data["held_out"],
            "fingerprint of the list": data["fingerprint"],
            "times that an image could not be used": summary["failures"],
        },
        "Training": {
            "objective": adaptation.objective,
            "rank, alpha": f"{lora.rank}, {lora.alpha:g}",
            "target modules": lora.target_modules,
            "rsLoRA, DoRA": f"{lora.use_rslora}, {lora.use_dora}",
            "learning rate, weight decay": f"{lora.learning_rate:g}, {lora.weight_decay:g}",
            "epochs, steps": f"{summary['epochs']}, {summary['steps']}",
            "images per step": config.data.domain.batch_size
            * config.data.domain.gradient_accumulation_steps
            * data["num_processes"],
            "seed": config.seed,
            "trajdist": __version__,
        },
        "Results": {
            "first and final loss": f"{summary['first_loss']:.4g}, {summary['final_loss']:.4g}",
            "trained parameters": summary["trained_parameters"],
        },
    }
    parts = [
        f"---\n{yaml.safe_dump(FRONT, sort_keys=False)}---\n",
        "# Adapter for anomaly detection by trajectories through a frozen backbone\n",
        "It finds the places of an image that do not belong. It works on the Phase 1 with the fingerprint below, which "
        "is not in this folder; `calibration.safetensors` of the same Phase 2 belongs beside the folder.\n",
        "```bash\ntrajdist score RUN_DIR IMAGES --out found --adapter THIS_FOLDER\n```\n",
    ]
    return "\n".join([*parts, *(_table(title, rows) for title, rows in sections.items())])


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""])


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
