a='''    weights, index = functionals(batch.scores, targets)
'''
assert a in s
s=s.replace(a,'''    weights, index = functionals(batch.scores, targets, batch.reading.symbols)
''')
a='''    """`(B, T)` int32: the class each map explains."""'''
assert a in s
s=s.replace(a,'''    """`(B, T)` int32: the class each map explains, or the symbol of a sequence; -1 where it is no single one."""''')
