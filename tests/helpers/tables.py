"""The tables that documents show of hosts, trainers, settings and versions.

`python -m tests.helpers.tables` writes them.
"""

from experiments.documents.markdown import update_documents
from experiments.provenance import ROOT
from tests.helpers import hosts_table, settings_table, trainers_table, versions_table

MAKERS = {
    "configs": settings_table.table,
    "hosts": hosts_table.table,
    "trainers": trainers_table.table,
    "versions": versions_table.table,
}

if __name__ == "__main__":
    update_documents(ROOT, MAKERS)
