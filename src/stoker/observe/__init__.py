"""What a person sees of a run: live progress, `metrics.jsonl`, trackers and `report.html`."""
