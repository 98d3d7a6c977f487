"""All that measures a model: views decoded and compared, the table of metrics, intervals and tests."""
