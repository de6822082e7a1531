"""What a person looks at: the MLflow runs, the figures, the report and the answer in words."""

import os

# MLflow decides while it is imported whether it sends telemetry; a user who set this is obeyed.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
