"""Check the folder of a finished run against what the run wrote down: ``python -m ctxjax.audit RUN``."""
