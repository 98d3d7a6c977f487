"""The configurations, also as the package ``ctxjax.configs`` (a symbolic link), which installations have too."""
