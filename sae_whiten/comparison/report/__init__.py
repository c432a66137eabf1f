"""The report of a comparison or an evaluation: pages, tables, sentences and figures."""
