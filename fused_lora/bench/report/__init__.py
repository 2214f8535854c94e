"""The report: one HTML file that opens offline, with its plots and its words inside."""

from fused_lora.bench.report.page import page as page
