// The op contract. Everything else in this folder implements one of these lines for one dispatch key.
#include <torch/library.h>

TORCH_LIBRARY(bhyt, m) {
  m.def(
      "forward(Tensor x, Tensor? weight, Tensor lam, float kappa=10.0, float eps=1e-06)"
      " -> (Tensor y, Tensor variance)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "forward_approx(Tensor x, Tensor variance, Tensor? variance_offset, Tensor? weight, Tensor lam,"
      " float kappa=10.0, float eps=1e-06) -> Tensor y",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "add_forward(Tensor x, Tensor residual, Tensor? weight, Tensor lam, float kappa=10.0, float eps=1e-06)"
      " -> (Tensor y, Tensor sum, Tensor variance)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "add_forward_approx(Tensor x, Tensor residual, Tensor variance, Tensor? variance_offset, Tensor? weight,"
      " Tensor lam, float kappa=10.0, float eps=1e-06) -> (Tensor y, Tensor sum)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "forward_quantized(Tensor x, Tensor? weight, Tensor lam, float scale, int zero_point=0, ScalarType dtype=int8,"
      " float kappa=10.0, float eps=1e-06) -> (Tensor q, Tensor variance)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "forward_approx_quantized(Tensor x, Tensor variance, Tensor? variance_offset, Tensor? weight, Tensor lam,"
      " float scale, int zero_point=0, ScalarType dtype=int8, float kappa=10.0, float eps=1e-06) -> Tensor q",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "add_forward_quantized(Tensor x, Tensor residual, Tensor? weight, Tensor lam, float scale, int zero_point=0,"
      " ScalarType dtype=int8, float kappa=10.0, float eps=1e-06) -> (Tensor q, Tensor sum, Tensor variance)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "add_forward_approx_quantized(Tensor x, Tensor residual, Tensor variance, Tensor? variance_offset,"
      " Tensor? weight, Tensor lam, float scale, int zero_point=0, ScalarType dtype=int8, float kappa=10.0,"
      " float eps=1e-06) -> (Tensor q, Tensor sum)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "backward(Tensor grad_y, Tensor? grad_variance, Tensor? grad_sum, Tensor x, Tensor variance, Tensor? weight,"
      " Tensor lam, float kappa, float eps, bool[3] output_mask)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_lam)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "backward_approx(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor variance, Tensor? variance_offset,"
      " Tensor? weight, Tensor lam, float kappa, float eps, bool[4] output_mask)"
      " -> (Tensor grad_x, Tensor grad_variance, Tensor grad_weight, Tensor grad_lam)",
      {at::Tag::pt2_compliant_tag});
}
