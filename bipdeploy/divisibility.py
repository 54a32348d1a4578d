"""tmp"""
def faults(arch, widths, n): return []
