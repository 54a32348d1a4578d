"""The table of repairs: what stage `recover` may do. A function takes a `Job`, returns a record."""

from __future__ import annotations

from bipdeploy.table import Row, by_name

# `needs`: artefacts of earlier stages.
REPAIRS = by_name(
    Row("none", (), None, "bipdeploy.stages.recover:nothing"),
    Row("refit", ("dense", "sliced"), None, "bipdeploy.stages.recover:refit"),
    Row("bias", ("dense", "sliced"), None, "bipdeploy.stages.recover:bias"),
)
