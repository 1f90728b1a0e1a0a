"""From residuals to scores, p-values, metrics and the report."""
