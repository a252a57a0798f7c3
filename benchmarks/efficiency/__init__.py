"""The paper's Tables 8 and 9, measured: whole models of LLaVA-1.5's shapes, one row beside the other."""
