"""The stages: each a plain function that reads artefacts and writes one folder."""
