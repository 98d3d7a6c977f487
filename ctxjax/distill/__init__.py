"""The papers' method on arrays: divergences, anchors, losses, sampling, scoring and the train step."""
