// OpenAI's own client for Node.
import assert from "node:assert/strict";
import OpenAI, { NotFoundError } from "openai";

const client = new OpenAI({ baseURL: process.env.EXPERTD_URL + "/v1", apiKey: "unused", maxRetries: 0 });
const asked = { model: "demo", prompt: "The capital of France is", max_tokens: 8, temperature: 0 };

const whole = await client.completions.create(asked);
assert.match(whole.choices[0].text, /^ Paris/);

let text = "";
for await (const chunk of await client.completions.create({ ...asked, stream: true })) text += chunk.choices[0].text;
assert.equal(text, whole.choices[0].text);

const messages = [{ role: "user", content: "What is the capital of France? Answer in one word." }];
const chat = { model: "demo", messages, max_completion_tokens: 12, temperature: 0 };
const answer = await client.chat.completions.create(chat);
assert.match(answer.choices[0].message.content, /Paris/);

const runner = client.chat.completions.stream(chat);
assert.equal((await runner.finalChatCompletion()).choices[0].message.content, answer.choices[0].message.content);

const response = await client.responses.create({ model: "demo", input: "Say hello.", max_output_tokens: 64, temperature: 0 });
assert.ok(response.output_text);

await assert.rejects(client.completions.create({ ...asked, model: "other" }), (error) => {
  return error instanceof NotFoundError && error.code === "model_not_found" && Boolean(error.requestID);
});
console.log("openai for node: ok");
