"""The tests mirror the package; `running.py` and `tiny.py` hold what several of them share."""

from bipdeploy.running.machine import quiet_libraries

quiet_libraries()  # as the command line does, before any library is imported
