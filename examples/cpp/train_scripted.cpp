// Runs a scripted model and trains it for one step, without Python.
//
//   train_scripted MODEL.pt TOKENS.pt RESULTS.pt
//
// MODEL.pt: torch.jit.save of a model [B, T] int64 -> logits [B, T, vocab].
// TOKENS.pt: torch.save of {"tokens": [B, T + 1]}.
// Writes {"logits", "loss", "grad.<parameter>" before the step, "<parameter>" after it}, for torch.load.
#include <torch/optim/sgd.h>
#include <torch/script.h>
#include <torch/serialize.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>

using torch::Tensor;

namespace {

c10::IValue read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return torch::pickle_load({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
}

void write(const char* path, const c10::IValue& value) {
  const std::vector<char> bytes = torch::pickle_save(value);
  std::ofstream(path, std::ios::binary).write(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: train_scripted MODEL.pt TOKENS.pt RESULTS.pt\n";
    return 2;
  }
  torch::jit::Module model = torch::jit::load(argv[1]);
  const Tensor tokens = read(argv[2]).toGenericDict().at("tokens").toTensor();
  const Tensor inputs = tokens.slice(1, 0, -1), targets = tokens.slice(1, 1);

  c10::Dict<std::string, Tensor> results;
  const Tensor logits = model.forward({inputs}).toTensor();
  const Tensor loss = torch::cross_entropy_loss(logits.flatten(0, 1), targets.flatten());
  loss.backward();
  results.insert("logits", logits.detach());
  results.insert("loss", loss.detach());

  std::vector<Tensor> parameters;
  std::vector<std::string> names;
  for (const auto& parameter : model.named_parameters()) {
    const auto same = [&](const Tensor& other) { return other.is_same(parameter.value); };
    if (std::any_of(parameters.begin(), parameters.end(), same)) continue;  // tied to one that is listed already
    TORCH_CHECK(parameter.value.grad().defined(), parameter.name, " has no gradient");
    results.insert("grad." + parameter.name, parameter.value.grad().clone());
    parameters.push_back(parameter.value);
    names.push_back(parameter.name);
  }
  torch::optim::SGD(parameters, torch::optim::SGDOptions(0.1)).step();
  for (size_t i = 0; i < parameters.size(); ++i) results.insert(names[i], parameters[i].detach());
  write(argv[3], results);
  std::cout << "loss " << loss.item<double>() << ", " << parameters.size() << " parameters trained\n";
}
