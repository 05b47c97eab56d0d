// The parts of the extension module. Files named bindings*.cpp are the only ones that know Python.
#pragma once

#include <nanobind/nanobind.h>

void rmr1_bind_verdict(nanobind::module_& m);
void rmr1_bind_kernels(nanobind::module_& m);
void rmr1_bind_generation(nanobind::module_& m);
void rmr1_bind_sample(nanobind::module_& m);
