-- Optuna's studies are in the database that PostgreSQL makes itself; MLflow has one of its own,
-- for both number their migrations in a table of the same name.
CREATE DATABASE mlflow OWNER tuner;
