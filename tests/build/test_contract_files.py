"""Rules about kiln's own files in /etc hold for the files that the plan makes."""

from kiln.build.validate import ETC_FILES
from kiln.sandbox.plan import ETC_FILES as PLANNED


def test_every_file_of_the_plan_has_its_rules() -> None:
    assert {path for path, _ in PLANNED} | {"etc/resolv.conf"} == ETC_FILES
