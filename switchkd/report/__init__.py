"""`python -m switchkd.report RUN_DIR`: one HTML file that shows a training run, opened offline."""
