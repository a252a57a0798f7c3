"""The paper's Tables 8 and 9: recomputed, and measured on whole models of LLaVA-1.5's shapes."""
